"""A GPT-2 that answers multiple-choice questions, for transformers and PyTorch.

It goes with every exported model that has this head, and is loaded by

    AutoModelForMultipleChoice.from_pretrained(FOLDER, trust_remote_code=True)

A question is a row of tokens for each choice: question [SEP] choice [SEP], the choice behind a space, padded on the
right with [PAD].
"""

from typing import Any

import torch
from transformers import GPT2Model, GPT2PreTrainedModel
from transformers.modeling_outputs import MultipleChoiceModelOutput


class GPT2ForMultipleChoice(GPT2PreTrainedModel):
    """A linear layer over the last token of each row that is no padding, after BioMedLM's finetune/mc."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.classifier = torch.nn.Linear(config.n_embd, 1)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None, **_: Any
    ) -> MultipleChoiceModelOutput:
        """Scores of choices, [batch, choices], from ids and mask, [batch, choices, seq]; cross-entropy of labels."""
        batch, choices, seq = input_ids.shape
        mask = attention_mask.reshape(-1, seq)
        hidden = self.transformer(input_ids.reshape(-1, seq), attention_mask=mask).last_hidden_state
        pooled = hidden[torch.arange(len(mask), device=mask.device), mask.sum(dim=1) - 1]
        logits = self.classifier(pooled).view(batch, choices)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return MultipleChoiceModelOutput(loss=loss, logits=logits)
