"""The student of sCD: a full network or a LoRA, which is told the teacher's guidance or has it in its weights."""

import copy
from dataclasses import fields

from cm_diffusers.engine.cli import refuse_changed
from cm_diffusers.engine.train_config import TrainConfig
from cm_diffusers.errors import UserError
from cm_diffusers.models.casting import cast
from cm_diffusers.models.dropout import DropoutConfig, set_dropout
from cm_diffusers.models.students import DTYPES, StudentNetworkConfig, make_networks, make_student
from cm_diffusers.models.time_weight import WithTimeWeight
from cm_diffusers.objectives.scm import SCDConfig, SCMConfig
from cm_diffusers.tasks.image_models import ImageModel
from cm_diffusers.tasks.image_runs import trainable_copy
from cm_diffusers.tasks.text_to_image_checks import check_student
from cm_diffusers.types import Networks


def check_flags(student: StudentNetworkConfig, method: SCMConfig, taught: SCDConfig, train: TrainConfig) -> None:
    """
    Raises:
        ValueError: A value out of range, a flag that would have no effect, a tangent in half precision, or distribution
            matching that cannot be.
    """
    check_student(student, train.mixed_precision)
    if taught.dmd_weight:
        _check_matching(student, method, train.max_train_steps)
    if student.lora and student.cast_teacher_unet != "no":
        raise UserError(
            f"--cast_teacher_unet {student.cast_teacher_unet} with --lora would take the student's derivative in half precision, "
            "in which differences drown and even --tangent jvp is inexact: leave it out; --mixed_precision may stay."
        )
    if taught.w_min == taught.w_max:
        where = "with --w_min equal to --w_max: such guidance goes into the weights"
        refuse_changed(student, "unet_time_cond_proj_dim", where)


def _check_matching(student: StudentNetworkConfig, method: SCMConfig, steps: int) -> None:
    if student.lora:
        raise UserError("--dmd_weight trains a second whole network, which --lora spares: leave one of them out.")
    if method.segments > 1:
        raise UserError(
            f"--dmd_weight judges jumps to the data, but with --segments {method.segments} they end before: leave one of "
            "them out."
        )
    if method.tangent_warmup_steps >= steps:
        raise UserError(
            f"--dmd_weight begins after the warm-up (--tangent_warmup_steps {method.tangent_warmup_steps}), but training ends "
            f"at step {steps} (--max_train_steps): give fewer steps of warm-up, or leave --dmd_weight out."
        )


def check_model(model: ImageModel, student: StudentNetworkConfig, taught: SCDConfig) -> None:
    """
    Raises:
        ValueError: Something was asked of a teacher that it cannot do.
    """
    if model.pipe is not None:
        return
    if (taught.w_min, taught.w_max) != (0, 0):
        raise UserError(
            f"The teacher is a {type(model.network).__name__} without a null condition, which guidance needs (--w_min "
            f"{taught.w_min}, --w_max {taught.w_max}): leave both out, or give a teacher that reads text."
        )
    refuse_changed(student, " ".join(field.name for field in fields(student)), "for a teacher that reads no text")


def guidance_embedding_dim(student: StudentNetworkConfig, taught: SCDConfig, model: ImageModel) -> int | None:
    """Of a student that is told its guidance; None where that goes into the weights, or its teacher is told, too."""
    return None if taught.w_min == taught.w_max else student.guidance_embedding_dim(model.network)


def student_and_teacher(
    model: ImageModel,
    student: StudentNetworkConfig,
    dropout: DropoutConfig,
    dim: int | None,
    learned_weight: bool,
    fake_score: bool = False,
) -> Networks:
    """Of a full student, a copy beside its teacher; of a LoRA, both in one network. There is no averaged target.

    Args:
        dim: As `guidance_embedding_dim`.
        learned_weight: Whether the student has a head for it, see `WithTimeWeight`.
        fake_score: Whether there is a critic, which begins as the student does, and has no dropout.
    """
    if student.lora:
        nets = make_networks(model.network, student)
        set_dropout(nets.student, dropout)
    elif model.pipe is None:
        nets = Networks(trainable_copy(model.network, dropout), teacher=model.network)
    else:
        nets = Networks(
            make_student(model.network, dim), teacher=cast(model.network, DTYPES[student.cast_teacher_unet])
        )
        set_dropout(nets.student, dropout)
    if fake_score:
        nets.critic = copy.deepcopy(nets.student).eval()
    if learned_weight:
        nets.student = WithTimeWeight(nets.student)
    return nets
