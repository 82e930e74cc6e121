"""Token budgets: how many visual tokens a picture may cost, split evenly over its tiles.

VisionZip (arXiv 2412.04467) keeps two kinds of token in each tile: *dominant* ones, chosen by the
attention they get from CLS (CLS itself is one of them), and *contextual* ones, means of what is left.
The paper always splits them 27:5. A user names one number, the total at the model's largest tile count:

>>> split_tokens(320, max_tiles=5, patches=576)
TokenBudget(dominant=54, contextual=10)
"""

from __future__ import annotations

from dataclasses import dataclass

from vz_edge.errors import BudgetError

DOMINANT_SHARE = 27 / 32  # section 4.1 of the paper: 54+10, 108+20, 162+30 are all 27:5
SMALLEST_PER_TILE = 4  # 3 dominant (CLS and two patches) + 1 contextual


@dataclass(frozen=True)
class TokenBudget:
    """Tokens kept in one tile. ``dominant`` counts CLS, as the paper's figures do."""

    dominant: int
    contextual: int

    @property
    def per_tile(self) -> int:
        """Tokens a tile."""
        return self.dominant + self.contextual

    def total(self, tiles: int) -> int:
        """Tokens of a picture of that many tiles."""
        return self.per_tile * tiles


def split_tokens(total: int, max_tiles: int, patches: int) -> TokenBudget:
    """Split a total over ``max_tiles`` tiles of ``patches`` patches, 27:5 dominant to contextual.

    Raises BudgetError, naming the nearest possible totals, where the total does not divide evenly or
    is too small or too large for a tile.
    """
    per_tile, remainder = divmod(total, max_tiles)
    if remainder or not SMALLEST_PER_TILE <= per_tile <= patches:
        raise BudgetError(
            f"tokens {total} is impossible for a model of {max_tiles} tile(s) with {patches} patches each: "
            f"the total must be a multiple of {max_tiles} from {SMALLEST_PER_TILE * max_tiles} to "
            f"{patches * max_tiles}; nearest: {' or '.join(map(str, _nearest(total, max_tiles, patches)))}"
        )
    dominant = round(per_tile * DOMINANT_SHARE)
    return check_budget(TokenBudget(dominant, per_tile - dominant), patches)


def parse_tokens(text: str, max_tiles: int, patches: int) -> TokenBudget | None:
    """The budget that a user's ``--tokens`` means: a total, or "all" (None). Raises BudgetError."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise BudgetError(f"--tokens {text}: expected a whole number or 'all'")
    try:
        return split_tokens(int(text), max_tiles, patches)
    except BudgetError as error:
        raise BudgetError(f"--{error} (or 'all')") from error  # which begins with "tokens 321"


def parse_budgets(text: str, max_tiles: int, patches: int) -> tuple[TokenBudget, ...]:
    """The budgets that ``--tokens 640,320,160`` means, the first is the default; none for "all". Raises BudgetError."""
    totals = [part.strip() for part in text.split(",")]
    if totals == ["all"]:
        return ()
    if "all" in totals:
        raise BudgetError(f"--tokens {text}: 'all' is a graph of its own and stands alone; export it as another bundle")
    if len(set(totals)) < len(totals):
        raise BudgetError(f"--tokens {text} names a total twice; give each once, the default first")
    budgets = [parse_tokens(total, max_tiles, patches) for total in totals]
    return tuple(budget for budget in budgets if budget is not None)


def check_budget(budget: TokenBudget, patches: int) -> TokenBudget:
    """Return the budget if a tile of ``patches`` patches can give it; raise BudgetError otherwise."""
    most_contextual = patches + 1 - budget.dominant
    if not 2 <= budget.dominant <= patches:
        raise BudgetError(
            f"--dominant {budget.dominant} is impossible: a tile has CLS and {patches} patches, and CLS is always "
            f"kept; choose 2 to {patches}"
        )
    if not 1 <= budget.contextual <= most_contextual:
        raise BudgetError(
            f"--contextual {budget.contextual} is impossible with --dominant {budget.dominant}: "
            f"{most_contextual} tokens of the tile are left to merge; choose 1 to {most_contextual}"
        )
    return budget


def _nearest(total: int, max_tiles: int, patches: int) -> list[int]:
    below = min(max(total // max_tiles, SMALLEST_PER_TILE), patches)
    above = min(max(-(-total // max_tiles), SMALLEST_PER_TILE), patches)
    return sorted({below * max_tiles, above * max_tiles})
