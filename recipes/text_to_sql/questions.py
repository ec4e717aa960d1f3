"""Questions about a library, in English and in SQL: what is asked for, of which books."""

from itertools import product
from typing import NamedTuple

SCHEMA = "books(id, title, author, year, pages), loans(id, book_id, member, day)"
AUTHORS = ["Ada Brook", "Jonas Hale", "Mira Stone", "Tom Ash"]

# Each query with a plain way to ask for it, and other ways.
ASKED = {
    "SELECT COUNT(*) FROM books{}": [
        "How many books are there {}?",
        "Count the books {}.",
        "We own how many books {}?",
    ],
    "SELECT title FROM books{}": [
        "List the titles of books {}.",
        "Which books {} are there?",
        "Name all books {}.",
    ],
    "SELECT DISTINCT author FROM books{}": [
        "Who wrote books {}?",
        "List the authors of books {}.",
        "Whose books are {}?",
    ],
    "SELECT MAX(pages) FROM books{}": [
        "How long is the longest of the books {}?",
        "Most pages of any book {}?",
        "Pages of the thickest book {}?",
    ],
    "SELECT MIN(year) FROM books{}": [
        "When was the first of the books {} published?",
        "Year of the oldest book {}?",
        "How far back do books {} go?",
    ],
    "SELECT AVG(pages) FROM books{}": [
        "What is the average number of pages of books {}?",
        "How long are books {} on average?",
        "Mean pages, books {}?",
    ],
    "SELECT COUNT(*) FROM loans WHERE book_id IN (SELECT id FROM books{})": [
        "How often were books {} lent?",
        "Count the loans of books {}.",
        "How many loans did books {} have?",
    ],
    "SELECT DISTINCT member FROM loans WHERE book_id IN (SELECT id FROM books{})": [
        "Which members borrowed books {}?",
        "Who borrowed books {}?",
        "List the readers of books {}.",
    ],
}
OF = [
    *((f"by {author}", f" WHERE author = '{author}'") for author in AUTHORS),
    *((f"from before {year}", f" WHERE year < {year}") for year in (1955, 1965, 1980, 1995, 2005)),
    *((f"from after {year}", f" WHERE year > {year}") for year in (1950, 1970, 1985, 1990, 2000)),
    *((f"of more than {pages} pages", f" WHERE pages > {pages}") for pages in (150, 200, 270, 320, 400)),
    *((f"of fewer than {pages} pages", f" WHERE pages < {pages}") for pages in (160, 250, 300, 350, 500)),
]


class Question(NamedTuple):
    text: str
    query: str

    @property
    def prompt(self) -> str:
        return f"-- {SCHEMA}\n-- {self.text}\n"


def every() -> tuple[list[Question], list[Question]]:
    """(asked in the plain way, asked in others)."""
    plain, others = list[Question](), list[Question]()
    for (query, ways), (which, where) in product(ASKED.items(), OF):
        first, *rest = (Question(way.format(which), f"{query.format(where)};") for way in ways)
        plain.append(first)
        others += rest
    return plain, others
