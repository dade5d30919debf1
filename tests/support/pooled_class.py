"""A class of a person's own: BERT's classifier on the mean over the tokens; it has the stock class's parameters."""

from __future__ import annotations

from typing import Any

from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooled(BertForSequenceClassification):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **_: Any) -> SequenceClassifierOutput:
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return SequenceClassifierOutput(logits=self.classifier((hidden * weight).sum(1) / weight.sum(1)))
