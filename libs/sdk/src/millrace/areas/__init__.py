"""The areas of the client, two or more to a module."""
