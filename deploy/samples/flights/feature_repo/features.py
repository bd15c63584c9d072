"""Features of a scheduled flight: what its schedule says, the weather at its origin, and how its surroundings run.

A data source's name is the name of a data contract; its rows come from that contract's records and lake table. A window asked for at an
instant holds the complete five-minute hops before it, so a flight never sees its own departure or delay.
"""

from datetime import timedelta

from feast import (
    Entity,
    FeatureService,
    FeatureView,
    Field,
    FileSource,
    PushSource,
    RequestSource,
    StreamFeatureView,
    ValueType,
)
from feast.aggregation import Aggregation
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64, String, UnixTimestamp


# --- Where rows come from -----------------------------------------------------------------------------------------------------
def _stream(contract: str, event_time: str) -> PushSource:
    lake = FileSource(name=f"{contract}_lake", path=f"millrace://{contract}", timestamp_field=event_time)
    return PushSource(name=contract, batch_source=lake)


flights = _stream("flights", "sched_dep_at")
departures = _stream("departures", "reported_at")
outcomes = _stream("outcomes", "landed_at")
weather = FileSource(name="weather", path="millrace://weather", timestamp_field="observed_at")

# --- What features belong to ---------------------------------------------------------------------------------------------------
origin = Entity(name="origin", join_keys=["origin"], value_type=ValueType.STRING, description="airport of departure")
dest = Entity(name="dest", join_keys=["dest"], value_type=ValueType.STRING, description="airport of arrival")
carrier = Entity(name="carrier", join_keys=["carrier"], value_type=ValueType.STRING, description="airline, IATA code")
tail = Entity(name="tail", join_keys=["tailnum"], value_type=ValueType.STRING, description="aircraft, tail number")

# --- Windowed history ----------------------------------------------------------------------------------------------------------
HOP = timedelta(minutes=5)
WINDOWS = {"1h": timedelta(hours=1), "6h": timedelta(hours=6), "24h": timedelta(hours=24), "7d": timedelta(days=7)}


def _windows(
    name: str, entities: list[Entity], source: PushSource, column: str, *, functions: list[str], labels: list[str]
) -> StreamFeatureView:
    """Each function of `column` over each window, named `<column>_<function>_<window>`."""
    chosen = [(function, label) for label in labels for function in functions]
    return StreamFeatureView(
        name=name,
        entities=entities,
        schema=[
            *[Field(name=entity.join_key, dtype=String) for entity in entities],
            *[Field(name=f"{column}_{f}_{w}", dtype=Int64 if f == "count" else Float64) for f, w in chosen],
        ],
        source=source,
        timestamp_field=source.batch_source.timestamp_field,
        aggregations=[
            Aggregation(column=column, function=f, time_window=WINDOWS[w], slide_interval=HOP, name=f"{column}_{f}_{w}")
            for f, w in chosen
        ],
    )


DELAY = ["mean", "count", "max"]
ALL, DAY, HOURS = ["1h", "6h", "24h", "7d"], ["1h", "6h", "24h"], ["1h", "6h"]

# Arrival delays of flights that had landed.
origin_delays = _windows("origin_delays", [origin], outcomes, "arr_delay", functions=DELAY, labels=ALL)
carrier_delays = _windows("carrier_delays", [carrier], outcomes, "arr_delay", functions=DELAY, labels=ALL)
route_delays = _windows("route_delays", [origin, dest], outcomes, "arr_delay", functions=DELAY, labels=ALL)
tail_delays = _windows("tail_delays", [tail], outcomes, "arr_delay", functions=DELAY, labels=ALL)
# Departure delays of flights that had left: hours fresher than arrivals.
origin_departures = _windows("origin_departures", [origin], departures, "dep_delay", functions=DELAY, labels=DAY)
carrier_departures = _windows("carrier_departures", [carrier], departures, "dep_delay", functions=DELAY, labels=DAY)
route_departures = _windows("route_departures", [origin, dest], departures, "dep_delay", functions=DELAY, labels=DAY)
tail_departures = _windows("tail_departures", [tail], departures, "dep_delay", functions=DELAY, labels=DAY)
dest_departures = _windows("dest_departures", [dest], departures, "dep_delay", functions=DELAY, labels=DAY)
carrier_origin_departures = _windows(
    "carrier_origin_departures", [carrier, origin], departures, "dep_delay", functions=DELAY, labels=DAY
)
# Minutes lost in the air and on taxiways.
origin_enroute = _windows("origin_enroute", [origin], outcomes, "enroute_delay", functions=["mean"], labels=DAY)
route_enroute = _windows("route_enroute", [origin, dest], outcomes, "enroute_delay", functions=["mean"], labels=DAY)
dest_enroute = _windows("dest_enroute", [dest], outcomes, "enroute_delay", functions=["mean"], labels=DAY)
# How many flights were scheduled: those that have not departed are overdue.
origin_schedule = _windows("origin_schedule", [origin], flights, "distance", functions=["count"], labels=HOURS)
carrier_origin_schedule = _windows(
    "carrier_origin_schedule", [carrier, origin], flights, "distance", functions=["count"], labels=HOURS
)
dest_schedule = _windows("dest_schedule", [dest], flights, "distance", functions=["count"], labels=HOURS)

# --- Newest rows ---------------------------------------------------------------------------------------------------------------
WEATHER = ["temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib"]
origin_weather = FeatureView(
    name="origin_weather",
    entities=[origin],
    ttl=timedelta(hours=3),
    schema=[Field(name="origin", dtype=String), *[Field(name=name, dtype=Float64) for name in WEATHER]],
    source=weather,
)
tail_last_departure = StreamFeatureView(
    name="tail_last_departure",
    entities=[tail],
    ttl=timedelta(days=2),
    schema=[
        Field(name="tailnum", dtype=String),
        Field(name="departed_epoch_min", dtype=Int64),
        Field(name="distance", dtype=Int64),
        Field(name="dep_delay", dtype=Int64),
    ],
    source=departures,
    timestamp_field="reported_at",
)

# --- Computed when asked -------------------------------------------------------------------------------------------------------
schedule_fields = RequestSource(
    name="schedule_fields",
    schema=[
        Field(name="carrier", dtype=String),
        Field(name="origin", dtype=String),
        Field(name="dest", dtype=String),
        Field(name="distance", dtype=Int64),
        Field(name="sched_duration", dtype=Int64),
        Field(name="sched_minute", dtype=Int64),
        Field(name="sched_dow", dtype=Int64),
    ],
)
departure_field = RequestSource(name="departure_field", schema=[Field(name="sched_dep_at", dtype=UnixTimestamp)])

# ruff: noqa: SIM905 - vocabularies read better as text
CARRIERS = "9E AA AS B6 DL EV F9 FL HA MQ OO UA US VX WN YV".split()
ORIGINS = ["EWR", "JFK", "LGA"]
DESTS = (
    "ABQ ACK ALB ANC ATL AUS AVL BDL BGR BHM BNA BOS BQN BTV BUF BUR BWI BZN CAE CAK CHO CHS CLE CLT CMH "
    "CRW CVG DAY DCA DEN DFW DSM DTW EGE EYW FLL GRR GSO GSP HDN HNL HOU IAD IAH ILM IND JAC JAX LAS LAX "
    "LEX LGA LGB MCI MCO MDW MEM MHT MIA MKE MSN MSP MSY MTJ MVY MYR OAK OKC OMA ORD ORF PBI PDX PHL PHX "
    "PIT PSE PSP PVD PWM RDU RIC ROC RSW SAN SAT SAV SBN SDF SEA SFO SJC SJU SLC SMF SNA SRQ STL STT SYR "
    "TPA TUL TVC TYS XNA "
).split()


@on_demand_feature_view(
    sources=[schedule_fields],
    mode="python",
    schema=[
        Field(name="carrier_code", dtype=Int64),
        Field(name="origin_code", dtype=Int64),
        Field(name="dest_code", dtype=Int64),
        Field(name="minute_of_day", dtype=Int64),
        Field(name="day_of_week", dtype=Int64),
        Field(name="distance_miles", dtype=Int64),
        Field(name="scheduled_minutes", dtype=Int64),
    ],
)
def schedule(inputs: dict[str, list]) -> dict[str, list]:
    """The schedule's own numbers, and each text as its place in a fixed list (-1: not in it)."""

    def codes(values: list[str | None], known: list[str]) -> list[int]:
        places = {value: place for place, value in enumerate(known)}
        return [places.get(value, -1) for value in values]

    return {
        "carrier_code": codes(inputs["carrier"], CARRIERS),
        "origin_code": codes(inputs["origin"], ORIGINS),
        "dest_code": codes(inputs["dest"], DESTS),
        "minute_of_day": inputs["sched_minute"],
        "day_of_week": inputs["sched_dow"],
        "distance_miles": inputs["distance"],
        "scheduled_minutes": inputs["sched_duration"],
    }


TURN_MINUTES = 30
MILES_PER_MINUTE = 7.7


@on_demand_feature_view(
    sources=[departure_field, tail_last_departure],
    mode="python",
    schema=[Field(name="since_departure_min", dtype=Float64), Field(name="slack_min", dtype=Float64)],
)
def turnaround(inputs: dict[str, list]) -> dict[str, list]:
    """Minutes since the aircraft last left New York, and what is left of them after flying there and back with two turns."""
    since: list[float | None] = []
    slack: list[float | None] = []
    columns = (inputs["sched_dep_at"], inputs["departed_epoch_min"], inputs["tail_last_departure__distance"])
    for scheduled, departed, distance in zip(*columns, strict=True):
        known = scheduled is not None and departed is not None
        since.append(scheduled.timestamp() / 60 - departed if known else None)
        there_and_back = 2 * (TURN_MINUTES + distance / MILES_PER_MINUTE) if distance is not None else None
        slack.append(since[-1] - there_and_back if since[-1] is not None and there_and_back is not None else None)
    return {"since_departure_min": since, "slack_min": slack}


# --- The vector: model 1.0.0 takes its first 7 + 9 columns --------------------------------------------------------------------
flight_delay = FeatureService(
    name="flight_delay",
    features=[
        schedule,
        origin_weather,
        origin_delays,
        carrier_delays,
        route_delays,
        tail_delays,
        origin_departures,
        carrier_departures,
        route_departures,
        tail_departures,
        dest_departures,
        carrier_origin_departures,
        origin_schedule,
        carrier_origin_schedule,
        dest_schedule,
        turnaround,
        origin_enroute,
        route_enroute,
        dest_enroute,
    ],
    description="Will a flight arrive more than 15 minutes late, asked at its scheduled departure",
)
