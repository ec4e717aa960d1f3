"""Nemotron 3, whose layers are of kinds that nobody computes here."""

from typing import Final

from knapper.engine.models.architecture import Architecture

ARCHITECTURES: Final[tuple[Architecture, ...]] = ()

MISSING: Final = {"nemotron_h": "layers of Mamba 2, and experts in place of MLPs"}
