"""The points of a sweep: grids, axes, and options that cannot work."""

import pytest

from minitune.decoding.options import GenerateConfig
from minitune.jobs.sweep import SweepConfig, decoding_points, sweep
from minitune.study.names import STUDY

QUIET = lambda line: None


def names(config):
    return [name for name, _, _ in decoding_points(config)[0]]


# --- the grid ---


def test_the_grid_of_the_study_has_the_points_of_its_files(data_dir):
    study = data_dir / "seed_results/data/section_3"
    for model in ("Mistral-7B", "phi-2", "Llama-2-7b-hf"):
        theirs = {p.name for p in study.glob(f"{model}-finetuned_*_score.json")}
        assert theirs == {f"{model}-finetuned_{name}_score.json" for name in names(SweepConfig(run="x", study=True))}


def test_the_lists_of_the_study_are_the_study():
    points = decoding_points(SweepConfig(run="x", study=True))
    assert len(points[0]) == 11 and points[1] == "topk50_nb5_t1"
    assert points == decoding_points(SweepConfig(run="x", **STUDY))
    for _, _, options in points[0]:
        assert (
            options.do_sample
            and options.max_new_tokens == 128
            and GenerateConfig(**options.given()).samples == (options.temperature > 0)
        )


def test_axes_go_through_the_default_or_else_the_first_of_a_list():
    assert names(SweepConfig(run="x", num_beams=(1, 2), top_k=(30, 50))) == [
        "topk30_nb1_t1", "topk50_nb1_t1", "topk50_nb2_t1",
    ]  # fmt: skip
    assert names(SweepConfig(run="x", num_beams=(1,), top_p=(0.5, 0.9, 0.5))) == [
        "topk50_nb1_t1_topp0.5", "topk50_nb1_t1_topp0.9",
    ]  # fmt: skip


def test_a_full_grid_has_every_combination():
    found = names(SweepConfig(run="x", grid="full", num_beams=(1, 2), top_k=(30, 50), early_stopping=("no", "yes")))
    assert len(found) == len(set(found)) == 8 and "topk30_nb2_t1_earlystoppingyes" in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give --run DIR"),
        ({"run": "x"}, "nothing is varied: give --study, or a list"),
        ({"run": "x", "top_k": (30,)}, "nothing is varied"),
        ({"run": "x", "top_k": (50, 50)}, "nothing is varied"),
        ({"run": "x", "top_k": ()}, "top_k is an empty list"),
        ({"run": "x", "study": True, "top_k": (30, 50)}, "--study defines the whole grid"),
        ({"run": "x", "study": True, "do_sample": False}, "--study defines the whole grid"),
        ({"run": "x", "top_k": (1, 2), "train": ("lora_rank=1,2",)}, "vary training first"),
        ({"run": "x", "study": True, "metrics": "blue"}, "there is no 'blue'"),
        ({"run": "x", "top_k": (1, "2")}, "top_k is"),
        ({"run": "x", "study": True, "retry_failed": True}, "retry-failed is for trainings that failed"),
        ({"run": "x", "study": True, "encoder_prefix_space": True}, "which needs --encoder, a RoBERTa or BERT"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SweepConfig(**options)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("lr=1e-4,2e-4", "--train lr=1e-4,2e-4: expected NAME=V1,V2 with an option of train.py"),
        ("lora_rank", "--train lora_rank: expected NAME=V1,V2"),
        ("run=a,b", "expected NAME=V1,V2"),
        ("lora_rank=8,x", "'x' is not a whole number, which lora_rank takes"),
        ("use_rslora=yes,no", "'yes' is not true or false"),
        ("schedule=linear,square", "'square' is not one of constant, linear, cosine"),
        ("lora_rank=8", "--train varies nothing"),
        ("lora_rank=8,0", "lora_rank is 0, expected a number above 0"),
    ],
)
def test_wrong_training_options_are_said_before_anything_is_trained(axis, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep(SweepConfig(run=str(tmp_path / "none"), train=(axis,)), QUIET)
    assert not (tmp_path / "none").exists()
