"""`python -m knapper` is `knapper`."""

from knapper.cli.main import main

if __name__ == "__main__":
    main()
