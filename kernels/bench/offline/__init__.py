"""The bundle for a GPU machine without a network. Standard library only."""
