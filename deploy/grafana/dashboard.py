"""The Grafana dashboard of a run: `python deploy/grafana/dashboard.py > deploy/grafana/shepherd.json`.

A test fails when shepherd.json is stale, another one runs every query of it against a Prometheus that has scraped a
run. Series that are named with colons come from deploy/prometheus/shepherd.rules.yml.
"""

from __future__ import annotations

import json
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, gauge, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    AnnotationQuery,
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

OBJECTIVE = 0.95
"""Goodput; shepherd:goodput_objective:ratio in the rules."""
LOW = 0.85
"""Three times the loss that the objective allows: what the rules write a ticket for after a day."""

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RUN = '{run="$run"}'
TRAINING = '{run="$run",state="training"}'
GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"
# Labels of the ledger to colours: green is work, red was lost to failures, the others are overhead.
COLOURS = {
    "productive": "green",
    "recomputed": "dark-red",
    "detection": "red",
    "recovery": "light-red",
    "provisioning": "dark-blue",
    "start_up": "blue",
    "data_wait": "yellow",
    "checkpoint_stall": "purple",
    "validation": "light-blue",
    "straggling": "semi-dark-yellow",
    "waiting_for_nodes": "dark-orange",
    "idle_spare": "light-green",
    "degraded_capacity": "orange",
    "paused": "text",
    "other": "semi-dark-purple",
}
# What an annotation shows; the SDK's type does not have these fields of the Prometheus data source.
ANNOTATIONS = {
    "Interruptions": {"titleFormat": "interruption: {{cause}}", "textFormat": "", "tagKeys": "cause", "step": "5s"},
    "Chaos": {"titleFormat": "chaos: {{fault}}", "textFormat": "", "tagKeys": "fault", "step": "5s"},
}


def query(expr: str, legend: str = "__auto", *, instant: bool = False) -> prometheus.Dataquery:
    made = prometheus.Dataquery().expr(expr).legend_format(legend).datasource(SOURCE)
    return made.instant() if instant else made.range()


def panel(kind: Any, title: str, description: str, width: int, height: int, *queries: prometheus.Dataquery) -> Any:
    """A panel `width` of 24 columns wide."""
    made = kind.Panel().title(title).description(description).datasource(SOURCE).span(width).height(height)
    for number, target in enumerate(queries):
        made.with_target(target.ref_id(chr(ord("A") + number)))
    if kind in (bargauge, gauge, stat):
        made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return made


def graph(title: str, description: str, width: int, *queries: prometheus.Dataquery) -> timeseries.Panel:
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    made: timeseries.Panel = panel(timeseries, title, description, width, 8, *queries)
    made.legend(legend.show_legend(True)).line_width(1).fill_opacity(8)
    return made.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))


def figure(title: str, description: str, width: int, *queries: prometheus.Dataquery) -> stat.Panel:
    made: stat.Panel = panel(stat, title, description, width, 5, *queries)
    return made.graph_mode(BigValueGraphMode.NONE).color_mode(BigValueColorMode.VALUE)


def thresholds(first: str, *steps: tuple[float, str]) -> ThresholdsConfig:
    """Colours from the lowest value up."""
    levels = [Threshold(value=None, color=first), *(Threshold(value=value, color=color) for value, color in steps)]
    return ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(levels)


def coloured(made: Any) -> Any:
    for label, color in COLOURS.items():
        fixed = DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})
        made.override_by_name(label, [fixed])
    return made


def now() -> list[Any]:
    goodput = panel(
        gauge,
        "Goodput against 95%",
        "Productive node time over all node time that the run paid for, spares and start-up counted.",
        9,
        5,
        query(f"max by (run) (run:shepherd_goodput:ratio_rate1h{RUN})", "last hour", instant=True),
        query(f"max by (run) (run:shepherd_goodput:ratio_rate24h{RUN})", "last 24 h", instant=True),
        query(f"max by (run) (run:shepherd_goodput:ratio{RUN})", "whole run", instant=True),
    )
    goodput.unit("percentunit").min(0).max(1).decimals(1)
    goodput.thresholds(thresholds(RED, (LOW, ORANGE), (OBJECTIVE, GREEN))).show_threshold_markers(True)
    lost = "(1 - max by (run) (run:shepherd_goodput_without_spares:ratio_rate{}{}))"
    lost += " / (1 - scalar(shepherd:goodput_objective:ratio))"
    burn = figure(
        "Budget burn",
        "Loss over the loss that 95% allows, idle spares left out. People are told at 14.4 in an hour, 3 in a day.",
        3,
        query(lost.format("1h", RUN), "1 h", instant=True),
        query(lost.format("24h", RUN), "24 h", instant=True),
    )
    burn.decimals(1).thresholds(thresholds(GREEN, (1, ORANGE), (3, RED)))
    state = figure(
        "State",
        "docs/states.md has the meaning of each.",
        3,
        query(f"max by (state) (shepherd_job_state{RUN}) == 1", "{{state}}", instant=True),
    )
    state.text_mode(BigValueTextMode.NAME).thresholds(thresholds(BLUE))
    progress = figure(
        "Steps",
        "Completed in the current history, and how many the run is to do.",
        3,
        query(f"max by (run) (shepherd_step{RUN})", "done", instant=True),
        query(f"max by (run) (shepherd_steps_target{RUN})", "of", instant=True),
    )
    progress.decimals(0).thresholds(thresholds(BLUE))
    left = figure(
        "Time left",
        "The steps that were never done, at the pace of the newest ones.",
        3,
        query(f"max by (run) (last_over_time(run:shepherd_remaining_seconds:max{RUN}[15m]))", "left", instant=True),
    )
    left.unit("s").decimals(0).thresholds(thresholds(BLUE))
    hold = figure(
        "Interruptions and holds",
        "What interrupted training, planned changes too. A hold: the journal cannot be written, nothing is decided.",
        3,
        query(f"sum(max by (cause) (shepherd_incidents_total{RUN}))", "interruptions", instant=True),
        query(f"max by (run) (shepherd_hold{RUN})", "hold", instant=True),
    )
    red = DynamicConfigValue("thresholds", thresholds(GREEN, (1, RED)).build())
    hold.decimals(0).thresholds(thresholds(BLUE)).override_by_name("hold", [red])
    return [goodput, burn, state, progress, left, hold]


def where_the_time_goes() -> list[Any]:
    share = graph(
        "Where the time goes",
        "Nodes by what their time counts as. Green is work; docs/monitoring.md has the other labels.",
        12,
        query(
            f"sum by (label) (rate(run_label:shepherd_node_seconds_total:max{RUN}[$__rate_interval])) > 0", "{{label}}"
        ),
    )
    share.unit("percent").stacking(common.StackingConfig().mode(StackingMode.PERCENT).group("A"))
    share.fill_opacity(80).line_width(0)
    total = panel(
        bargauge,
        "Since the run was declared",
        "All its node time by label; with the step in flight it adds up to wall-clock x places.",
        6,
        8,
        query(f"sort_desc(max by (label) (shepherd_node_seconds_total{RUN}) > 0)", "{{label}}", instant=True),
    )
    total.unit("s").decimals(1).orientation(VizOrientation.HORIZONTAL).display_mode(BarGaugeDisplayMode.GRADIENT)
    history = graph(
        "Goodput",
        "Over windows that end at each moment, against the objective.",
        6,
        query(f"max by (run) (run:shepherd_goodput:ratio_rate1h{RUN})", "1 h"),
        query(f"max by (run) (run:shepherd_goodput:ratio_rate24h{RUN})", "24 h"),
        query(f"max by (run) (run:shepherd_goodput:ratio{RUN})", "run"),
        query("shepherd:goodput_objective:ratio", "objective"),
    )
    history.unit("percentunit").min(0).max(1).fill_opacity(0)
    return [coloured(share), coloured(total), history]


def training() -> list[Any]:
    loss = graph(
        "Loss",
        "Of the newest step, nats per token. A recovery that gives steps up repeats their losses.",
        10,
        query(f"max by (run) (shepherd_loss{RUN})", "loss"),
    )
    speed = graph(
        "Throughput",
        "Of the newest steps of the current generation, while it trains.",
        7,
        query(
            f"max by (run) (shepherd_tokens_per_second{RUN}) "
            f"and on (run) max by (run) (shepherd_job_state{TRAINING}) == 1",
            "tokens/s",
        ),
        query(f"max by (run) (shepherd_step_seconds{RUN})", "time of a step"),
    )
    right = [DynamicConfigValue("custom.axisPlacement", "right"), DynamicConfigValue("unit", "s")]
    speed.min(0).override_by_name("time of a step", right)
    gradient = graph(
        "Gradient norm and learning rate",
        "Norm over the whole mesh before clipping.",
        7,
        query(f"max by (run) (shepherd_gradient_norm{RUN})", "gradient norm"),
        query(f"max by (run) (shepherd_learning_rate{RUN})", "learning rate"),
    )
    gradient.override_by_name("learning rate", right[:1])
    return [loss, speed, gradient]


def nodes() -> list[Any]:
    states = graph(
        "Nodes by state",
        "Against the places that the run pays for. Lost ones are counted since the run was started or resumed.",
        12,
        query('max by (state) (shepherd_nodes{run="$run",state!="lost"})', "{{state}}"),
        query(f"max by (run) (shepherd_places{RUN})", "places"),
        query('max by (run) (shepherd_nodes{run="$run",state="lost"})', "lost"),
    )
    states.min(0).decimals(0).fill_opacity(40).stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    line = [DynamicConfigValue("custom.stacking", {"mode": "none"}), DynamicConfigValue("custom.fillOpacity", 0)]
    states.override_by_name("places", line).override_by_name("lost", line)
    struck = panel(
        table,
        "Interruptions by node",
        "Which nodes were struck, and by what. The same node again and again points to its hardware.",
        6,
        8,
        query(f"max by (node, cause) (shepherd_node_incidents_total{RUN})", instant=True).format(PromQueryFormat.TABLE),
    )
    columns = {"excludeByName": {"Time": True}, "renameByName": {"Value": "interruptions"}}
    struck.with_transformation(DataTransformerConfig(id_val="organize", options=columns))
    strikes = panel(
        bargauge,
        "Strikes",
        "Failures charged to a node that is still there. At recovery.strikes it is quarantined, if a spare is there.",
        6,
        8,
        query(f"sort_desc(max by (node) (shepherd_node_strikes{RUN}))", "{{node}}", instant=True),
    )
    strikes.min(0).decimals(0).orientation(VizOrientation.HORIZONTAL).thresholds(thresholds(ORANGE, (3, RED)))
    return [states, struck, strikes]


def checkpoints() -> list[Any]:
    behind = graph(
        "Steps since the newest checkpoint",
        "What the loss of all copies in memory would cost. Beyond three intervals, two checkpoints are missing.",
        9,
        query(
            f"max by (run) (shepherd_step{RUN}) - (max by (run) (shepherd_checkpoint_step{RUN}) "
            f"or max by (run) (shepherd_step{RUN} * 0 and shepherd_steps_target{RUN}))",
            "steps",
        ),
        query(f"3 * max by (run) (shepherd_checkpoint_interval_steps{RUN})", "too many"),
    )
    behind.min(0).decimals(0)
    age = graph(
        "Age of the newest checkpoint",
        "Since it was committed. 'verified': a node has read it back whole.",
        6,
        query(f"max by (run) (shepherd_checkpoint_age_seconds{RUN})", "age"),
        query(f"max by (run) (shepherd_checkpoint_verified_age_seconds{RUN})", "of the newest verified"),
    )
    age.unit("s").min(0)
    step = figure(
        "Newest checkpoint",
        "Its step.",
        3,
        query(f"max by (run) (shepherd_checkpoint_step{RUN})", "step", instant=True),
    )
    step.height(8).decimals(0).thresholds(thresholds(BLUE))
    failed = graph(
        "Failed saves, damaged checkpoints",
        "Saves that failed since the run was declared; 'failing' is 1 until one succeeds again. 'damaged' are the "
        "checkpoints that are so now.",
        6,
        query(f"max by (run) (shepherd_checkpoint_failures_total{RUN})", "failed"),
        query(f"max by (run) (shepherd_checkpoint_failing{RUN})", "failing"),
        query('max by (run) (shepherd_checkpoints{run="$run",trust="damaged"})', "damaged"),
    )
    failed.min(0).decimals(0)
    return [behind, age, step, failed]


def recovery() -> list[Any]:
    phases = panel(
        bargauge,
        "Mean recovery by rung and phase",
        "Teardown: until all workers have ended. Restart: copies, workers, rendezvous, model. Restore, first step.",
        8,
        8,
        query(
            f"max by (rung, phase) (shepherd_recovery_seconds_total{RUN}) "
            f"/ on (rung) group_left () (max by (rung) (shepherd_recoveries_total{RUN}) > 0)",
            "{{rung}}: {{phase}}",
            instant=True,
        ),
    )
    phases.unit("s").min(0).orientation(VizOrientation.HORIZONTAL).display_mode(BarGaugeDisplayMode.GRADIENT)
    causes = graph(
        "Interruptions by cause",
        "Since the run was declared, counted once the cause is judged.",
        6,
        query(f"max by (cause) (shepherd_incidents_total{RUN}) > 0", "{{cause}}"),
        query(f"max by (fault) (shepherd_faults_injected_total{RUN}) > 0", "chaos: {{fault}}"),
    )
    causes.min(0).decimals(0)
    cost = panel(
        bargauge,
        "What interruptions cost",
        "Node time of detection, recovery, waiting and recomputation.",
        5,
        8,
        query(f"sort_desc(max by (cause) (shepherd_incident_node_seconds_total{RUN}) > 0)", "{{cause}}", instant=True),
    )
    cost.unit("s").min(0).orientation(VizOrientation.HORIZONTAL).thresholds(thresholds(ORANGE))
    lost = graph(
        "Generations and lost steps",
        "Assignments of slots to workers, controllers, and completed steps that recoveries gave up.",
        5,
        query(f"max by (run) (shepherd_generation{RUN})", "generation"),
        query(f"max by (run) (shepherd_epoch{RUN})", "controller"),
        query(f"max by (run) (shepherd_steps_lost_total{RUN})", "steps lost"),
    )
    lost.min(0).decimals(0)
    return [phases, causes, cost, lost]


def annotation(name: str, label: str, series: str, color: str) -> AnnotationQuery:
    """A mark where a counter has risen since the point before it, or since the scrape before it that did not fail."""
    before = f"last_over_time({series}{RUN}[5m] offset $__interval)"
    risen = f"max by ({label}) ({series}{RUN}) > max by ({label}) ({before})"
    return AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(color).expr(risen)


def dashboard() -> dict[str, Any]:
    """The dashboard as a JSON object."""
    made = (
        Dashboard("Shepherd: a run")
        .uid("shepherd-run")
        .description("A training run: its goodput, where its time goes, and what happened to it.")
        .tags(["shepherd"])
        .editable()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("10s")
        .with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            QueryVariable("run")
            .label("run")
            .datasource(SOURCE)
            .query("label_values(shepherd_step, run)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_ASC)
        )
        .annotation(annotation("Interruptions", "cause", "shepherd_incidents_total", RED))
        .annotation(annotation("Chaos", "fault", "shepherd_faults_injected_total", ORANGE))
    )
    rows = {
        "Now": now(),
        "Where the time goes": where_the_time_goes(),
        "Training": training(),
        "Nodes": nodes(),
        "Checkpoints": checkpoints(),
        "Recovery": recovery(),
    }
    for title, panels in rows.items():
        made.with_row(Row(title))
        for each in panels:
            made.with_panel(each)
    document: dict[str, Any] = json.loads(json.dumps(made.build(), cls=JSONEncoder))
    for number, each in enumerate(document["panels"], start=1):
        each["id"] = number
    for each in document["annotations"]["list"]:
        each |= ANNOTATIONS[each["name"]]
    return document


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
