"""Adapter folders as files: written, combined, exported."""
