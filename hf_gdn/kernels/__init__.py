"""Declare the ops, each with its oracle and random inputs. `contract` defines the signatures of their kernels.

All ops but the norm come in pairs: one decay per head (GDN) and one per channel (KDA).
"""

from __future__ import annotations

from ..registry import Op, register_op
from . import inputs, reference

CHUNK_GDN = register_op(Op("chunk_gdn", reference.delta_rule, inputs.for_delta_rule(per_channel=False)))
RECURRENT_GDN = register_op(Op("recurrent_gdn", reference.delta_rule, inputs.for_delta_rule(per_channel=False)))
CHUNK_KDA = register_op(Op("chunk_kda", reference.delta_rule, inputs.for_delta_rule(per_channel=True)))
RECURRENT_KDA = register_op(Op("recurrent_kda", reference.delta_rule, inputs.for_delta_rule(per_channel=True)))
BACKWARD_GDN = register_op(Op("backward_gdn", reference.delta_rule_backward, inputs.for_backward(per_channel=False)))
BACKWARD_KDA = register_op(Op("backward_kda", reference.delta_rule_backward, inputs.for_backward(per_channel=True)))
STEP_GDN = register_op(Op("step_gdn", reference.step, inputs.for_layer(per_channel=False, state=True)))
STEP_KDA = register_op(Op("step_kda", reference.step, inputs.for_layer(per_channel=True, state=True)))
PROLOGUE_GDN = register_op(Op("prologue_gdn", reference.prologue, inputs.for_layer(per_channel=False, state=False)))
PROLOGUE_KDA = register_op(Op("prologue_kda", reference.prologue, inputs.for_layer(per_channel=True, state=False)))
BACKWARD_PROLOGUE_GDN = register_op(
    Op("backward_prologue_gdn", reference.prologue_backward, inputs.for_backward_prologue(per_channel=False))
)
BACKWARD_PROLOGUE_KDA = register_op(
    Op("backward_prologue_kda", reference.prologue_backward, inputs.for_backward_prologue(per_channel=True))
)
GATED_NORM = register_op(Op("gated_norm", reference.gated_norm, inputs.for_gated_norm))
BACKWARD_GATED_NORM = register_op(
    Op("backward_gated_norm", reference.gated_norm_backward, inputs.for_backward_gated_norm)
)
