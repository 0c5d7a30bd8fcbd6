"""Ahead-of-time compilation of a run's programs: memory, operations and least time, without the hardware."""

from audio_grpo.plan.chart import plan_chart
from audio_grpo.plan.limits import Limit, limits, remedies
from audio_grpo.plan.run_plan import Planner, ProgramPlan, RunPlan
from audio_grpo.plan.told import plan_json, plan_text

__all__ = ["Limit", "Planner", "ProgramPlan", "RunPlan", "limits", "plan_chart", "plan_json", "plan_text", "remedies"]
