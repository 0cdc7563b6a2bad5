# SPDX-License-Identifier: Apache-2.0
"""Scores of a real model, compared with those computed from its full logits."""

import pytest
import torch

from tests.models import build_hf_model, build_model

IMAGE, PAD = 5, 0


@pytest.fixture(scope="module")
def model(single_rank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    build_hf_model(image_token_id=IMAGE).model.vision_tower.save_pretrained(folder)
    torch.manual_seed(5)
    model = build_model(str(folder)).eval()
    for parameter in model.language_model.output_layer.parameters():
        parameter.data.mul_(20)  # a random model's probabilities are almost equal
    return model


def sample(length: int, seed: int, targets: int):
    from megatron_smar.data.batch import EncodedSample

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 128, (length,), generator=generator)
    ids[:4] = IMAGE
    mask = torch.zeros(length)
    mask[length - targets :] = 1
    return EncodedSample(
        __key__=str(seed),
        __restore_key__=(),
        input_ids=ids,
        labels=torch.cat([ids[1:], ids[:1]]),
        loss_mask=mask,
        pixel_values=torch.randint(0, 256, (1, 3, 32, 32), generator=generator, dtype=torch.uint8),
        num_images=1,
    )


def logits_of(model, ids, pixels) -> torch.Tensor:
    from tests.models import prepare

    batch = prepare(ids[None], torch.zeros_like(ids[None], dtype=torch.bool), pixels, IMAGE)
    with torch.no_grad():
        return model(**batch)[0].float()


def evaluator_of(model, **settings):
    from megatron_smar.evaluation.evaluator import Evaluator

    return Evaluator(model, [IMAGE], 4, PAD, **settings)


def test_scores_equal_those_of_the_full_logits_whatever_the_chunks(model, monkeypatch):

    samples = [sample(length, seed, targets) for length, seed, targets in ((9, 1, 3), (14, 2, 5), (11, 3, 1))]
    sure = logits_of(model, samples[2].input_ids, samples[2].pixel_values)[-1].argmax()
    samples[2].labels[-1] = sure
    continues = torch.arange(128) % 2 == 0
    from megatron_smar.evaluation import evaluator

    monkeypatch.setattr(evaluator, "_POSITIONS", 5)  # chunks that end within rows
    scores = evaluator_of(model, batch_size=2, continues_word=continues).score(samples, "test")
    for score, item in zip(scores, samples, strict=True):
        kept, logits = item.loss_mask > 0, logits_of(model, item.input_ids, item.pixel_values)
        losses = torch.nn.functional.cross_entropy(logits, item.labels, reduction="none")
        assert score.loss == pytest.approx(float(losses[kept].sum()), rel=1e-5)
        assert score.tokens == int(kept.sum())
        assert score.exact == bool((logits.argmax(dim=-1) == item.labels)[kept].all())
    assert [score.exact for score in scores] == [False, False, True]
    assert scores[2].words == scores[2].words_completed == int(sure % 2 == 0)


def test_the_scores_of_several_endings_equal_those_of_samples_that_end_with_them(model):
    samples = [sample(length, seed, targets) for length, seed, targets in ((9, 1, 1), (14, 2, 5), (11, 3, 1))]
    likely = [int(logits_of(model, item.input_ids, item.pixel_values)[-1].argmax()) for item in samples]
    endings = [[7, likely[0], 9], None, [likely[2]]]
    found = evaluator_of(model, batch_size=2).score_endings(samples, endings, "test")
    assert [len(scores) for scores in found] == [3, 1, 1]
    for item, ends, scores in zip(samples, endings, found, strict=True):
        for ending, score in zip(ends or [int(item.labels[-1])], scores, strict=True):
            item.labels[-1] = ending
            (alone,) = evaluator_of(model).score([item], "test")
            assert score.loss == pytest.approx(alone.loss, rel=1e-5)
            assert (score.tokens, score.exact) == (alone.tokens, alone.exact)
    assert [score.exact for score in found[0]] == [False, True, False] and found[2][0].exact


def test_the_scores_of_a_batch_are_read_from_the_device_in_one_copy(model, monkeypatch):
    """Every read waits for the device, so a read per sample would be slow."""

    labels, logits = torch.zeros(4, 6, dtype=torch.int64), torch.randn(4, 6, 128)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1:3, 2:] = True
    reads = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (reads.append(self.shape), to_host(self))[1])
    losses, hit = evaluator_of(model)._loss_and_hit(logits, labels, mask)
    assert reads == [(2, 8)] and losses.shape == hit.shape == labels.shape
    assert (losses[mask] > 0).all() and not losses[~mask].any() and not hit[~mask].any()


def test_long_samples_share_a_pass_with_fewer_others(model, monkeypatch):
    from megatron_smar.evaluation import evaluator

    monkeypatch.setattr(evaluator, "_BATCH_POSITIONS", 40)
    passes = list(evaluator_of(model, batch_size=3)._passes([50, 20, 19, 12, 10, 9, 2], "test"))
    assert passes == [[0], [1, 2], [3, 4, 5], [6]]
