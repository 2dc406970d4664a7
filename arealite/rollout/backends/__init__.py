"""The servers 'wire formats: one protocol, and a file per kind of server."""
