"""Results as text for a terminal."""

from typing import TYPE_CHECKING

from audio_grpo.data import DataSummary

if TYPE_CHECKING:  # what it stands on brings JAX, which `data inspect` does without
    from audio_grpo.training.evaluation_report import ErrorRates, EvaluationReport


def evaluation_table(report: "EvaluationReport") -> str:
    """Rates and counts, of all clips, by language and by duration."""
    rows = [("all", report.rates), *report.by_language.items(), *report.by_duration.items()]
    head = f"{'':20} {'WER':>8} {'CER':>8} {'sub':>6} {'del':>6} {'ins':>6} {'words':>7} {'clips':>6}"
    return "\n".join([head, *(_rates_row(name, rates) for name, rates in rows)])


def _rates_row(name: str, rates: "ErrorRates") -> str:
    counts = f"{rates.substitutions:6} {rates.deletions:6} {rates.insertions:6}"
    return f"{name:20} {rates.wer:8.2%} {rates.cer:8.2%} {counts} {rates.reference_words:7} {rates.clips:6}"


def data_table(summary: DataSummary) -> str:
    """Counts, hours, lengths, languages, what is unusable, and some records."""
    percentiles = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in summary.seconds_percentiles.items())
    lines = [f"{summary.records} records, {summary.hours:.2f} h", f"lengths: {percentiles}"]
    lines += [f"{name}: {share.records} records, {share.hours:.2f} h" for name, share in summary.languages.items()]
    lines += [
        f"unusable: {len(names)} records: {reason}: {', '.join(names[:5])}"
        for reason, names in summary.unusable.items()
    ]
    lines += [f"{look.id or '-'}  {look.seconds:.1f} s  {look.sampling_rate} Hz  {look.text}" for look in summary.first]
    return "\n".join(lines)
