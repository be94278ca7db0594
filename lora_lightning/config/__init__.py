"""The configuration: schemas, composition, and settings that exclude each other."""
