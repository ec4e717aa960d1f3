"""Values that some reader of them gets wrong: numbers at limits, texts that are none, headers that nobody expects."""

from typing import Any

from tests.fuzz.bodies import JSON, PROTOBUF

NUMBERS = [
    b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"-0", b"-0.0", b"1e-400",
    b"0", b"-1", b"1", b"0.5", b"1.0",
    b"2147483647", b"2147483648", b"4294967295", b"4294967296", b"9007199254740993", b"9223372036854775807",
    b"9223372036854775808", b"-9223372036854775809", b"18446744073709551616", b"1" + b"0" * 30, b"1" + b"0" * 400,
    b"9" * 5000, b"1e308", b"3.5e38", b"1e-45", b"1E+2", b"01", b"1.", b"0x10", b"true", b"false",
]  # fmt: skip
TEXTS: list[Any] = [
    "", "\x00", "a\x00b", " ", "\n", "\x1b[2J", "..", "../../x", "/etc/passwd", "a/b",
    "C:\\x", "é", "日本", "😀", "\u202e",
    "a" * 200, "a" * 201, "a" * 1025, "x" * 100_000, "nan", "inf", "1e400", "0", "-1",
    "true", "null", "None", "1_000", "١",
    b"\\ud800", b"\\udc00x", b"a\\ud83d", b"\\u0000", b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\\x", b"\\", b"\\u12",
    "2026-01-01", "0001-01-01T00:00:00Z", "9999-12-31T23:00:00-14:00", "0001-01-01T00:00:00+14:00", "2026-13-45",
    "tinker://", "tinker://a/b/c", "file:///etc/passwd", "{{7*7}}", "%s%n", "__class__", "ses-" + "0" * 32,
]  # fmt: skip
SHAPES = [b"null", b"{}", b"[]", b"[[]]", b"[null]", b'{"":null}', b'{"type":"x"}', b'""', b"tru", b"", b"}", b","]

HEADERS: dict[str, list[str]] = {
    "Content-Type": [
        JSON, PROTOBUF, "", "text/plain", "application/json; charset=utf-16", "x" * 2000, "multipart/form-data", "\xff",
        "application/cloudevents+json", "application/cloudevents-batch+json", "application/x-json",
    ],
    "Content-Encoding": ["zstd", "gzip", "br", "identity", "ZSTD", "zstd, zstd", "", "\xe9"],
    "Accept": ["", "*/*", PROTOBUF, "text/event-stream", "q=" * 500],
    "X-API-Key": [
        "", "tml-", "tml-local", "tml-" + "0" * 64, "eyJ", "eyJhbGciOiJub25lIn0.e30.", "\xff\xfe", "x" * 5000,
    ],
    "Authorization": ["", "Bearer", "Bearer ", "Basic YTpi", "Bearer eyJhIjox", "bearer tml-\xe9"],
    "X-Idempotency-Key": ["", "k", "\xff", "x" * 4000, "a\tb"],
    "X-Tinker-Weights-Access-Token": ["", "t"],
    "X-Forwarded-For": ["127.0.0.1", "nonsense", "::1", "1.2.3.4, 5.6.7.8", "\xff", ","],
    "Host": ["localhost", "127.0.0.1", "", "[::1]:80", "[::", "a b", "x:99999", "\xff", "example.org"],
    "traceparent": ["00-" + "0" * 32 + "-" + "0" * 16 + "-00", "x", "\xff"],
    "ce-id": ["", "\xff", "x" * 2000], "ce-specversion": ["", "0.3", "9.9"], "ce-type": ["", "dev.knapper.tick", "x"],
    "ce-step": ["-1", "9" * 30, "1.5"], "ce-epoch": ["x", "9" * 18], "ce-way": ["lost", "x"], "ce-time": ["x", "0"],
    "ce-datacontenttype": ["application/json", "x", ""], "ce-data": ["x"], "ce-data_base64": ["!"],
    "ce-subject": ["\xff"],
}  # fmt: skip
