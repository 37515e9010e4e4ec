"""What has been tried on purpose to break a run, with the tests that try it, and what comes of it.

`python -m tests.contract.faults` counts the test cases. `test_faults.py` keeps the table true.
"""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

SAME = "trained bit for bit as without callbacks, all numbers logged"


class Fault(NamedTuple):
    """One thing that goes wrong, or is odd.

    Attributes:
        name: What.
        outcome: What becomes of the run and of the measurements.
        tests: Where it is tried: file and function below `tests/`, optionally with the id of one case.
    """

    name: str
    outcome: str
    tests: tuple[str, ...]


def _layer(name, outcome=SAME, case=None):
    test = "contract/test_odd_layers.py::test_odd_layers_are_measured_and_trained_as_without_us"
    return Fault(name, outcome, (f"{test}[{case or name}-",))


def _number(name, outcome=SAME):
    return Fault(
        name,
        outcome,
        (f"contract/test_odd_numbers.py::test_odd_numbers_are_measured_and_trained_as_without_us[{name}-",),
    )


_NO_PICTURES = f"{SAME}; that they can't be drawn as images is said once"
_NAMES = "contract/test_odd_names.py::"
_PROCESSES = "contract/test_processes.py::"
_FAILURES = "contract/test_failures.py::"
_SETTINGS = "contract/test_settings.py::"
_CHECKPOINTS = "contract/test_checkpoints.py::"
_DDP = "contract/test_ddp.py::"
FAULTS = (
    # disks
    Fault(
        "disk full in mid-run",
        "said once by each callback that can't write; training, other loggers and the user's metrics go on",
        (
            f"{_FAILURES}test_full_disk_is_said_once",
            f"{_FAILURES}test_events_that_cannot_be_written_do_not_end_the_run[full]",
            f"{_FAILURES}test_events_of_the_user_that_cannot_be_written_end_the_run_as_without_us[full]",
            f"{_FAILURES}test_events_of_the_user_are_written_once_there_is_room_again",
            f"{_FAILURES}test_file_that_fills_the_disk_in_mid_run_is_said_once",
        ),
    ),
    Fault(
        "log folder deleted in mid-run",
        "what lies there rests, said once; other loggers and the training go on; the projector's folder is made again",
        (
            f"{_FAILURES}test_log_folder_deleted",
            f"{_FAILURES}test_events_that_cannot_be_written_do_not_end_the_run[deleted]",
            f"{_FAILURES}test_events_of_the_user_that_cannot_be_written_end_the_run_as_without_us[deleted]",
            "test_projector.py::test_folder_deleted_in_mid_run_is_made_again",
        ),
    ),
    Fault(
        "log folder read-only, or a file",
        "files and pictures are left out, said once; numbers and alerts go on in the loggers",
        (
            f"{_FAILURES}test_log_folder_that_is_read_only_is_said_and_training_goes_on",
            f"{_FAILURES}test_log_folder_that_is_a_file_is_said_and_training_goes_on",
        ),
    ),
    # numbers
    _number("NaN and inf in weights", "trained as without; what has no number is left out, and the alert says why"),
    _number("NaN and inf in activations"),
    _number("some images NaN", "trained as without; what has no number is left out, said once"),
    _number("all images inf", "trained as without; what has no number is left out, said once"),
    _number("loss NaN", f"{SAME} until then; the alert `non_finite` says it"),
    _number("all filters dead"),
    _number("batches of one"),
    _number("last batch smaller"),
    # layers
    _layer("images of 1 channel"),
    _layer("images of 2 channels"),
    _layer("images of 4 channels"),
    _layer("images of 13 channels"),
    _layer("Conv1d over signals", _NO_PICTURES),
    _layer("Conv1d over rows of images", f"{SAME}; no Grad-CAM, said once"),
    _layer("Conv3d over volumes", _NO_PICTURES),
    _layer("transposed"),
    _layer("grouped, depthwise, pointwise"),
    _layer("kernels 1x1 only"),
    _layer("fake-quantised", f"{SAME}; no projections of patches, said once"),
    _layer("quantised in validation"),
    Fault(
        "int8 convolution",
        f"{SAME} of the layers behind it; what needs the gradient of the pixels rests, said once",
        ("contract/test_odd_layers.py::test_int8_convolution_is_left_alone_and_the_layers_behind_it_are_measured",),
    ),
    _layer("lazy until the sanity check"),
    Fault(
        "lazy until the first step",
        f"{SAME}; pictures from the first due moment after it, which is said once",
        (
            "contract/test_odd_layers.py::test_odd_layers_are_measured_and_trained_as_without_us[lazy until the first",
            "contract/test_odd_layers.py::test_lazy_layers_are_shown_from_the_end_of_the_first_epoch_on",
        ),
    ),
    Fault(
        "shared modules and weights",
        SAME,
        (
            "contract/test_odd_layers.py::test_odd_layers_are_measured_and_trained_as_without_us[shared",
            "contract/test_odd_layers.py::test_a_module_under_two_names_keeps_its_weights_when_patches_are_drawn",
            "functional/test_own_state.py::",
        ),
    ),
    _layer("parametrised weights"),
    _layer("norms by hooks"),
    _layer("pruned"),
    Fault(
        "model surgery, between epochs and in mid-epoch",
        f"{SAME}, for the layers that the model has now; what begins anew is said once",
        (
            "contract/test_odd_layers.py::test_surgery_is_followed",
            "contract/test_odd_layers.py::test_dead_filters_after_surgery_equal_brute_force",
            "contract/test_odd_layers.py::test_filters_that_are_shown_are_those_that_the_model_has_now",
            "contract/test_odd_layers.py::test_patches_are_as_large_as_what_the_new_layer_sees",
        ),
    ),
    # amounts
    Fault(
        "data loader workers, forked and spawned",
        SAME,
        ("contract/test_odd_numbers.py::test_data_loader_with_workers",),
    ),
    Fault(
        "10,000 classes",
        "trained; a few of them are shown, logs and checkpoint stay small",
        (
            "contract/test_odd_numbers.py::test_ten_thousand_classes",
            "contract/test_odd_numbers.py::test_a_data_set_of_ten_thousand_classes",
        ),
    ),
    Fault(
        "100,000 tags asked for",
        "as many as there are layers; 100,000 scalars of one step are one event",
        (
            "contract/test_odd_numbers.py::test_a_hundred_thousand_layers_asked_for",
            "contract/test_odd_numbers.py::test_a_hundred_thousand_tags_at_one_step",
        ),
    ),
    # names
    Fault(
        "unicode, slashes, `<script>`, line breaks and escapes in layer names", f"{SAME}, under these names", (_NAMES,)
    ),
    # objects and processes
    Fault(
        "two fits in a row with the same callbacks",
        "the second gives the same numbers as the first",
        (
            f"{_CHECKPOINTS}test_same_callbacks_in_two_fits_give_the_same_twice",
            f"{_CHECKPOINTS}test_same_trainer_can_fit_again_and_test_validate_predict",
        ),
    ),
    Fault(
        "deepcopy and pickle of callbacks",
        "the copy measures like the original",
        (
            f"{_SETTINGS}test_callbacks_can_be_pickled_and_copied_before_and_after_a_fit",
            f"{_SETTINGS}test_callbacks_can_be_pickled_and_copied_during_validation",
            f"{_SETTINGS}test_callbacks_can_be_pickled_and_copied_in_the_middle_of_a_step",
        ),
    ),
    Fault(
        "deepcopy and pickle of the model in mid-step",
        "the copy is free of us, and loads without this package",
        (
            f"{_CHECKPOINTS}test_copies_made_inside_a_step_are_free_of_hooks_that_do_anything",
            f"{_CHECKPOINTS}test_deepcopy_inside_a_step_does_not_disturb_the_measurement",
        ),
    ),
    Fault("spawn", "the callbacks arrive whole", (f"{_SETTINGS}test_callbacks_survive_the_way_to_a_spawned_process",)),
    Fault(
        "notebook cell run twice, or again after an interruption",
        "a folder of its own for each run, the same numbers, nothing left on the model",
        (f"{_PROCESSES}test_cell_that_runs_twice", f"{_PROCESSES}test_cell_that_was_interrupted_runs_again"),
    ),
    Fault(
        "SIGTERM",
        "the exit status of a run without callbacks; what was measured is on disk",
        (f"{_PROCESSES}test_sigterm_ends_the_run_as_without_us_and_what_was_measured_is_on_disk",),
    ),
    Fault(
        "kill -9 in mid-epoch, then a resume",
        "the weights of a run in one piece; no step lost, none twice",
        (
            f"{_PROCESSES}test_run_that_was_killed_in_mid_epoch_goes_on_where_its_checkpoint_ends",
            f"{_CHECKPOINTS}test_resume_in_mid_epoch_loses_and_repeats_nothing",
            f"{_CHECKPOINTS}test_what_a_checkpoint_takes_for_written_is_on_disk",
        ),
    ),
    Fault(
        "checkpoint of an older version",
        "read as if it were of this one",
        (f"{_CHECKPOINTS}test_checkpoint_of_the_version_before_is_read_as_if_it_were_ours",),
    ),
    Fault(
        "checkpoint of a newer version, or one that can't be read",
        "said once; training goes on",
        (
            f"{_CHECKPOINTS}test_checkpoint_of_a_newer_version_is_said_once_a_callback_and_begun_anew",
            f"{_CHECKPOINTS}test_checkpoint_of_another_version_costs_the_callback_at_most",
        ),
    ),
    Fault("networks drawn at random", f"{SAME}, dead filters as by brute force", ("contract/test_random_models.py::",)),
    # several ranks
    Fault(
        "DDP: unequal batches",
        "dead filters equal the brute-force union over ranks",
        (f"{_DDP}test_dead_filters_equal_the_brute_force_union_over_ranks",),
    ),
    Fault(
        "DDP: a rank without data",
        "it takes part; the same numbers on all",
        (f"{_DDP}test_rank_without_data_takes_part",),
    ),
    Fault(
        "DDP: a callback fails on one rank",
        "it rests on all or on none; no rank waits for another",
        (
            f"{_DDP}test_failure_on_one_rank_hangs_nobody",
            f"{_DDP}test_failure_of_a_family_on_one_rank_hangs_nobody",
            f"{_DDP}test_failure_to_draw_on_rank_zero_hangs_nobody",
        ),
    ),
    Fault(
        "DDP: kill -9 of one rank",
        "the other ends with the exit status of a run without callbacks",
        (f"{_PROCESSES}test_rank_that_loses_the_other_ends_as_without_us",),
    ),
    # errors
    Fault(
        "an error in any hook of any callback",
        "said once, the callback rests, its neighbours and training go on",
        (f"{_FAILURES}test_error_in_a_hook_is_reported_once_and_training_goes_on",),
    ),
    Fault(
        "an error, Ctrl-C or exit in the user's step or callback",
        "it is raised as without us; nothing is left on the model, and the last losses are on disk",
        (
            f"{_FAILURES}test_error_in_a_step_of_the_user_leaves_nothing_behind",
            f"{_FAILURES}test_error_in_a_callback_of_the_user_leaves_nothing_behind",
        ),
    ),
)


def collected() -> list[str]:
    """The ids of all test cases in the files of the table, below `tests/`."""
    files = sorted({f"tests/{test.split('::')[0]}" for fault in FAULTS for test in fault.tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line.removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line]


def cases(fault: Fault, ids: list[str]) -> list[str]:
    """The test cases that try one fault."""
    return [each for each in ids if each.startswith(fault.tests)]


if __name__ == "__main__":
    known = collected()
    for fault in FAULTS:
        print(f"| {fault.name} | {fault.outcome} | {len(cases(fault, known))} |")
    print(f"{len(FAULTS)} faults tried in {len({case for fault in FAULTS for case in cases(fault, known)})} test cases")
