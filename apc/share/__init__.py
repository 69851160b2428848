"""Results that people pass on: a folder or a hub repository, and the sparse model that it makes."""
