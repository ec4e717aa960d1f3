"""The `knapper` command."""
