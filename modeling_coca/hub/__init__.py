"""Models for others: folders and Hub repositories that bring their code and a card along."""

from .export import export_to_folder, push_to_hub

__all__ = ["export_to_folder", "push_to_hub"]
