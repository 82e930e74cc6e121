"""Vision towers: one file each, named after :attr:`~vz_edge.recipe.TowerSpec.type`, all with the same names.

``build(builder, checkpoint, spec, states_read, pixel_values, quant)`` appends a tower's nodes and returns
:class:`TowerValues`: what a selector asks of a tower.
"""

from __future__ import annotations

from vz_edge.host.towers import clip
from vz_edge.host.towers.clip import TowerValues

TOWERS = {"clip": clip.build}

__all__ = ["TOWERS", "TowerValues"]
