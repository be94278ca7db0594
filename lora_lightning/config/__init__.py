"""Configuration with schemas, composition, and checks of settings that exclude each other."""
