"""Models for others: folders and Hub repositories that bring their code and a card along."""

from .export import export_to_folder, push_to_hub
from .model_card import model_card, training_card

__all__ = ["export_to_folder", "model_card", "push_to_hub", "training_card"]
