"""ERNIE: BERT's names and heads, and in some models a task type, always 0, among the embeddings."""

from __future__ import annotations

from typing import Any

from clinfast.engine.spec import Unsupported
from clinfast.models import bert
from clinfast.models.reader import Family


class ErnieReader(bert.BertReader):
    """BERT's reader with the table of task types. Stock takes type 0 where no `task_type_ids` are given."""

    def _embeddings(self, embeddings: Any) -> dict[str, Any]:
        found = super()._embeddings(embeddings)
        self.constant(embeddings, "use_task_id")
        if not embeddings.use_task_id:
            return found
        path, width = self.at("embeddings.task_type_embeddings"), found["embedding_size"]
        table = self.table("embedding.task_type", embeddings.task_type_embeddings, path, width)
        if not table.shape[0] or not found["type_vocab_size"]:
            raise Unsupported(f"{path} needs rows, and a table of token types beside it")
        return {"task_type_vocab_size": table.shape[0], **found}


CLASSES = bert.classes(
    Family("ernie", "transformers.models.ernie.modeling_ernie", "Ernie", "ernie", ErnieReader), **bert.HEADS
)
