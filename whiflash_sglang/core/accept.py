"""Acceptance of drafts: pure functions, lossless by construction.

The target chooses a token after every position of the verify window, greedily or by sampling from its own adjusted
distribution. Drafts are accepted while they equal that choice. The first choice that differs, or that follows the last
draft, becomes the bonus token.

Every committed token is the target's own choice given committed tokens only. Greedy text is therefore the plain greedy
text, and sampled text has the plain distribution, whatever the drafter proposes. For drafters that propose one token
per position, without a distribution, this accepts as often as the rejection sampling of Leviathan et al.
(arXiv 2211.17192): with probability p(draft).
"""

from __future__ import annotations

import torch

from whiflash_sglang.core.transfer import columns
from whiflash_sglang.core.types import Accepted, Proposal


def accept(proposal: Proposal, predictions: torch.Tensor) -> Accepted:
    """Accept the longest prefix of each row's drafts that equals the target's choices, plus the bonus token.

    `predictions` [rows, width] int64: column j is the target's choice after window column j. A window of one token
    may have more columns, of steps that followed; all are committed.
    """
    width = proposal.tokens.shape[1]
    if width == 1:
        return Accepted(predictions, torch.full_like(proposal.num_drafts, predictions.shape[1]))
    matches = proposal.tokens[:, 1:] == predictions[:, :-1]  # [rows, width - 1]; draft j vs. the choice before it
    # Padding is never accepted, even if it matches.
    matches &= columns(width, predictions.device)[1:] <= proposal.num_drafts[:, None]
    accepted_drafts = matches.to(torch.int64).cumprod(dim=1).sum(dim=1)  # [rows]
    # Accepted drafts equal the target's choices, so the choices themselves are the committed tokens.
    return Accepted(predictions, accepted_drafts + 1)
