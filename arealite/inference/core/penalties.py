"""What a request does to its logits before a token is drawn: penalties, biases, and no end before min_new_tokens.

Called by batcher.py; returned logprobs include all of it, as SGLang's do (sampling/penaltylib, 0.5.23): they are of the
policy that drew the token, which a trainer's importance weights need. What the trainer computes has none of it.
"""

from __future__ import annotations

import numpy as np
import torch

from arealite.inference.core.sequence import Sequence

LARGEST = 1e30  # a logit that is to be finite in float32, whatever it is divided by


def adjust(sequences: list[Sequence], logits: torch.Tensor) -> torch.Tensor:
    """Rows of logits [B, V] as their requests want them: the same tensor where none wants anything, else float32.

    In this order: frequency and presence penalties are subtracted, for tokens generated so far; the repetition penalty
    divides what is positive and multiplies what is not, for tokens of prompt and answer; biases are added; before
    min_new_tokens what would end the answer gets -inf. Tokens generated before an interruption count as generated if
    the request says how many they are (`num_prompt_tokens` of the wire); otherwise nothing tells them from the prompt.
    """
    rows = [i for i, sequence in enumerate(sequences) if sequence.adjusts_logits]
    if rows:
        logits = logits.float()
    for i in rows:
        _adjust_row(sequences[i], logits[i])
    return logits


def _adjust_row(sequence: Sequence, row: torch.Tensor) -> None:
    params, request = sequence.request.params, sequence.request
    generated = sequence.tokens[sequence.num_prompt - request.num_given :]
    if (params.frequency_penalty or params.presence_penalty) and generated:
        ids, counts = np.unique(generated, return_counts=True)
        fall = params.frequency_penalty * counts + params.presence_penalty
        row[torch.from_numpy(ids)] -= torch.from_numpy(fall).to(row)
    if params.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(sequence.tokens))
        values, penalty = row[seen], params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty).clamp_(-LARGEST, LARGEST)
    if params.logit_bias:
        biased, biases = zip(*params.logit_bias, strict=True)
        row[list(biased)] += row.new_tensor(biases).clamp_(-LARGEST, LARGEST)
    if len(generated) < params.min_new_tokens:
        row[[token for token in sequence.stop_ids if token < len(row)]] = -torch.inf
