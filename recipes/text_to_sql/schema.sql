CREATE TABLE books (id INTEGER PRIMARY KEY, title TEXT, author TEXT, year INTEGER, pages INTEGER);
CREATE TABLE loans (id INTEGER PRIMARY KEY, book_id INTEGER, member TEXT, day INTEGER);
INSERT INTO books (title, author, year, pages) VALUES
  ('The Salt Road', 'Ada Brook', 1962, 212), ('A House of Reeds', 'Ada Brook', 1971, 340),
  ('Low Water', 'Ada Brook', 1988, 158), ('The Lantern Keeper', 'Jonas Hale', 1954, 420),
  ('Nine Winters', 'Jonas Hale', 1966, 388), ('The Glass Orchard', 'Mira Stone', 1979, 265),
  ('Rain on Slate', 'Mira Stone', 1993, 301), ('Small Hours', 'Mira Stone', 2001, 144),
  ('The Ferryman''s Book', 'Mira Stone', 2009, 510), ('Oak and Iron', 'Tom Ash', 1948, 276),
  ('The Long Field', 'Tom Ash', 1997, 333), ('Letters Home', 'Tom Ash', 2015, 190);
INSERT INTO loans (book_id, member, day) VALUES
  (1, 'Lena', 3), (1, 'Omar', 9), (2, 'Lena', 12), (4, 'Pia', 2), (5, 'Omar', 5), (6, 'Pia', 7), (6, 'Sven', 20),
  (6, 'Lena', 25), (8, 'Sven', 1), (9, 'Omar', 14), (11, 'Lena', 18), (12, 'Pia', 28);
