"""Every alert of deploy/alerts.yml is shown a series on which it must speak and a healthy one on which it must not."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from kvbank.cluster.families import ALL

DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy"
GROUPS = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
RULES = {rule["alert"]: rule for group in GROUPS for rule in group["rules"]}
WORKER = 'worker="worker-0"'
REDIS = f'{WORKER},tier="redis"'
HOST = f'{WORKER},tier="host"'
TTFT = "kvbank_ttft_seconds_bucket"


class Case(NamedTuple):
    """Series in promtool's notation, without the labels job and instance: `first+step x count`, one value a minute."""

    bad: dict[str, str]
    good: dict[str, str]
    minute: int = 59                 # when the alert must speak, and on `good` must not


CASES = {
    "KvbankGatewayDown": Case({"up": "1x10 0x50"}, {"up": "1x60"}),
    "KvbankNoModelWorker": Case(
        {'kvbank_members_expected{kind="model"}': "2x60", 'kvbank_member_up{kind="lender",worker="lender-0"}': "1x60"},
        {'kvbank_members_expected{kind="model"}': "2x60", f'kvbank_member_up{{kind="model",{WORKER}}}': "1x60"}),
    "KvbankMemberMissing": Case(
        {'kvbank_members_expected{kind="model"}': "2x60", f'kvbank_member_up{{kind="model",{WORKER}}}': "1x60"},
        {'kvbank_members_expected{kind="model"}': "1x60", f'kvbank_member_up{{kind="model",{WORKER}}}': "1x60",
         'kvbank_members_expected{kind="lender"}': "0x60"}),
    "KvbankMemberSilent": Case({f'kvbank_member_up{{kind="model",{WORKER}}}': "1x30 0x30"},
                               {f'kvbank_member_up{{kind="model",{WORKER}}}': "1x60"}),
    "KvbankMemberRestarts": Case({f"kvbank_member_steps_total{{{WORKER}}}": "0+1x48 0+1x3 0+1x3 0+1x3"},
                                 {f"kvbank_member_steps_total{{{WORKER}}}": "0+1x30 0+1x30"}),
    "KvbankWorkerStuck": Case(
        {f'kvbank_member_jobs{{{WORKER},state="running"}}': "1x60", f"kvbank_member_steps_total{{{WORKER}}}": "7x60"},
        {f'kvbank_member_jobs{{{WORKER},state="running"}}': "1x60", f"kvbank_member_steps_total{{{WORKER}}}": "7+1x60"}),
    "KvbankErrorsLogged": Case({f"kvbank_logged_errors_total{{{WORKER}}}": "0x55 1x5"},
                               {f"kvbank_logged_errors_total{{{WORKER}}}": "1x60"}),
    "KvbankQueueNearlyFull": Case(
        {'kvbank_jobs{state="queued"}': "60x60", 'kvbank_jobs{state="running"}': "35x60", "kvbank_jobs_limit": "100x60"},
        {'kvbank_jobs{state="queued"}': "50x60", 'kvbank_jobs{state="running"}': "35x60", "kvbank_jobs_limit": "100x60"}),
    "KvbankOverloaded": Case({'kvbank_requests_refused_total{code="overloaded"}': "0+3x60"},
                             {'kvbank_requests_refused_total{code="overloaded"}': "5x60",
                              'kvbank_requests_refused_total{code="invalid_request"}': "0+3x60"}),
    "KvbankJobsFailing": Case(
        {'kvbank_jobs_ended_total{outcome="stop"}': "0+90x60", 'kvbank_jobs_ended_total{outcome="internal"}': "0+10x60"},
        {'kvbank_jobs_ended_total{outcome="stop"}': "0+90x60", 'kvbank_jobs_ended_total{outcome="cancelled"}': "0+10x60"}),
    "KvbankFirstTokenSlow": Case(
        {TTFT + '{le="60",model="m"}': "0+90x60", TTFT + '{le="300",model="m"}': "0+100x60",
         TTFT + '{le="+Inf",model="m"}': "0+100x60"},
        {TTFT + '{le="60",model="m"}': "0+100x60", TTFT + '{le="300",model="m"}': "0+100x60",
         TTFT + '{le="+Inf",model="m"}': "0+100x60"}),
    "KvbankHitRatioFell": Case(
        {'kvbank_prompt_tokens_total{tenant="a"}': "0+6000x420", 'kvbank_reused_tokens_total{source="device",tenant="a"}':
         "0+4000x360 1440000+100x60"},
        {'kvbank_prompt_tokens_total{tenant="a"}': "0+6000x420", 'kvbank_reused_tokens_total{source="device",tenant="a"}':
         "0+4000x360 1440000+3000x60"}, minute=410),
    "KvbankLoansLost": Case({f'kvbank_borrowed_spans_lost_total{{{WORKER},reason="term"}}': "0+1x60"},
                            {f'kvbank_borrowed_spans_lost_total{{{WORKER},reason="term"}}': "9x60"}),
    "KvbankReplaying": Case(
        {f"kvbank_member_replayed_tokens_total{{{WORKER}}}": "0+10x60",
         f"kvbank_member_forward_rows_total{{{WORKER}}}": "0+100x60"},
        {f"kvbank_member_replayed_tokens_total{{{WORKER}}}": "0+1x60",
         f"kvbank_member_forward_rows_total{{{WORKER}}}": "0+100x60"}),
    "KvbankBooksDisagree": Case(
        {'kvbank_member_blocks{state="lent",worker="lender-0"}': "8x60",
         f"kvbank_member_borrowed_blocks{{{WORKER}}}": "0x60"},
        {'kvbank_member_blocks{state="lent",worker="lender-0"}': "8x60",
         f"kvbank_member_borrowed_blocks{{{WORKER}}}": "8x60"}),
    "KvbankWrongBytes": Case({f"kvbank_tier_integrity_total{{{REDIS}}}": "0x55 1x5"},
                             {f"kvbank_tier_integrity_total{{{REDIS}}}": "3x60",
                              f"kvbank_attend_tainted_total{{{WORKER}}}": "0x60"}),
    "KvbankBreakerOpen": Case(
        {f'kvbank_tier_breaker{{{REDIS},state="open"}}': "0x50 1 0 1x8", f'kvbank_tier_breaker{{{REDIS},state="half_open"}}':
         "0x50 0 1 0x8"},
        {f'kvbank_tier_breaker{{{REDIS},state="open"}}': "0x60", f'kvbank_tier_breaker{{{REDIS},state="off"}}': "1x60"}),
    "KvbankDeviceMemoryFull": Case(
        {f'kvbank_member_blocks{{{WORKER},state="free"}}': "4x60", f"kvbank_member_capacity_blocks{{{WORKER}}}": "100x60"},
        {f'kvbank_member_blocks{{{WORKER},state="free"}}': "6x60", f"kvbank_member_capacity_blocks{{{WORKER}}}": "100x60"}),
    "KvbankTierPinned": Case(
        {f'kvbank_tier_pinned_bytes{{{HOST}}}': "95x60", f'kvbank_tier_limit_bytes{{{HOST}}}': "100x60"},
        {f'kvbank_tier_pinned_bytes{{{HOST}}}': "0x60", f'kvbank_tier_limit_bytes{{{HOST}}}': "0x60"}),
    "KvbankWritesDropped": Case({f'kvbank_write_behind_frames_total{{{REDIS},outcome="full"}}': "0+1x60"},
                                {f'kvbank_write_behind_frames_total{{{REDIS},outcome="stored"}}': "0+1x60"}),
}


def promtool() -> str:
    if (found := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed: it comes with Debian's package prometheus")
    return found


def with_target(series: str, instance: str) -> str:
    name, _, rest = series.partition("{")
    return f'{name}{{job="kvbank",instance="{instance}",{rest or "}"}'


def judged(folder: Path, cases: dict[str, Case], *, good_speaks: int = 0) -> subprocess.CompletedProcess[str]:
    """promtool's verdict: each series is a gateway of its own, so one history holds all cases."""
    given, asked = [], []
    for alert, case in cases.items():
        for kind, series, spoken in (("bad", case.bad, 1), ("good", case.good, good_speaks)):
            instance = f"{alert}-{kind}"
            given += [{"series": with_target(name, instance), "values": values} for name, values in series.items()]
            said = f'count(ALERTS{{alertname="{alert}",alertstate="firing",instance="{instance}"}}) or vector(0)'
            asked.append({"expr": said, "eval_time": f"{case.minute}m", "exp_samples": [{"labels": "{}", "value": spoken}]})
    (folder / "cases.yml").write_text(yaml.safe_dump({
        "rule_files": [str(DEPLOY / "alerts.yml")], "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": given, "promql_expr_test": asked}]}))
    return subprocess.run([promtool(), "test", "rules", str(folder / "cases.yml")], capture_output=True, text=True, timeout=120)


def test_every_alert_has_its_case_and_every_case_its_alert() -> None:
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("alert", RULES)
def test_an_alert_asks_only_for_metrics_that_exist_and_says_what_to_do(alert: str) -> None:
    rule = RULES[alert]
    asked = set(re.findall(r"\bkvbank_\w+", rule["expr"]))
    assert {name.removesuffix("_bucket") for name in asked} <= set(ALL)
    assert rule["labels"]["severity"] in ("page", "ticket") and set(rule["annotations"]) == {"summary", "action"}


def test_prometheus_accepts_its_configuration_and_the_rules() -> None:
    asked = [promtool(), "check", "config", str(DEPLOY / "prometheus.yml")]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_speaks_when_it_must_and_only_then(tmp_path: Path) -> None:
    done = judged(tmp_path, CASES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_error_before_the_first_scrape_is_not_missed(tmp_path: Path) -> None:
    name = f"kvbank_logged_errors_total{{{WORKER}}}"
    done = judged(tmp_path, {"KvbankErrorsLogged": Case({name: "_x50 1x10"}, {name: "_x50 0x10"})})
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_rule_that_never_speaks_is_found_out(tmp_path: Path) -> None:
    """The check above bites: on a healthy series nothing fires, so expecting an alert there fails."""
    done = judged(tmp_path, {"KvbankGatewayDown": CASES["KvbankGatewayDown"]}, good_speaks=1)
    assert done.returncode != 0 and "KvbankGatewayDown-good" in done.stdout + done.stderr
