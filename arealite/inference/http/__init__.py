"""The HTTP side of the built-in server: bodies, routes, streams."""
