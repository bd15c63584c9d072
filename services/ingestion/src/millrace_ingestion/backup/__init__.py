"""Backup and restore of the lake and of the database that belongs to it."""
