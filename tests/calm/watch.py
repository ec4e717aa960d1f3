"""Asks a server's health every 50 ms, from a process of its own: `python watch.py URL` writes a line an answer.

Each line: when it asked (seconds of this machine's monotonic clock), and how long the answer took.
"""

import http.client
import sys
import time
from urllib.parse import urlsplit

EVERY_S = 0.05


def main() -> None:
    url = urlsplit(sys.argv[1])
    assert url.hostname is not None
    while True:
        began = time.monotonic()
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=300)
        try:
            connection.request("GET", url.path)
            assert connection.getresponse().read()
        finally:
            connection.close()
        took = time.monotonic() - began
        print(f"{began} {took}", flush=True)
        time.sleep(max(0.0, EVERY_S - took))


if __name__ == "__main__":
    main()
