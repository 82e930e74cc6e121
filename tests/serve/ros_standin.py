"""A thin stand-in for what vz_edge.serve.ros2 uses of ROS 2: rclpy's lifecycle nodes, and five message types.

Topics and services live in the node itself; ``send``, ``call`` and ``transition`` do what an executor would do, each
in the caller's thread. Written after rclpy's sources; what ROS itself does (discovery, QoS, threads) is not in it.
"""

from __future__ import annotations

import array
import enum
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest


class TransitionCallbackReturn(enum.Enum):
    SUCCESS = 0
    FAILURE = 1
    ERROR = 2


SUCCESS, FAILURE, ERROR = TransitionCallbackReturn


@dataclass
class Parameter:
    name: str
    value: Any = None


@dataclass
class Publisher:
    """As a lifecycle publisher: what is published while it is not activated is lost without a word."""

    type: type
    topic: str
    qos: Any
    sent: list[Any] = field(default_factory=list)
    activated: bool = False

    def publish(self, message: Any) -> None:
        assert isinstance(message, self.type)
        if self.activated:
            self.sent.append(message)


@dataclass(eq=False)
class Entity:
    """A subscription or a service."""

    type: type
    name: str
    callback: Callable[..., Any]
    qos: Any = None
    callback_group: Any = None


class Logger:
    def __init__(self) -> None:
        self.errors: list[str] = []

    def error(self, text: str) -> None:
        self.errors.append(text)


class LifecycleNode:
    STEPS: ClassVar = {
        "configure": ("unconfigured", "inactive"),
        "activate": ("inactive", "active"),
        "deactivate": ("active", "inactive"),
        "cleanup": ("inactive", "unconfigured"),
    }

    def __init__(self, node_name: str, *, parameter_overrides: list[Parameter] | None = None) -> None:
        self.name = node_name
        self.state = "unconfigured"
        self.context = types.SimpleNamespace(ok=lambda: True)
        self.publishers: dict[str, Publisher] = {}
        self.entities: dict[str, Entity] = {}
        self._overrides = {parameter.name: parameter.value for parameter in parameter_overrides or []}
        self._declared: dict[str, Parameter] = {}
        self._logger = Logger()

    def declare_parameter(self, name: str, value: Any) -> None:
        assert name not in self._declared
        given = self._overrides.get(name, value)
        if type(given) is not type(value) or value == []:  # rclpy takes an empty list for one of bytes
            raise TypeError(f"{name} is {given!r}, not of the type of {value!r}")
        self._declared[name] = Parameter(name, given)

    def get_parameter(self, name: str) -> Parameter:
        return self._declared[name]

    def get_logger(self) -> Logger:
        return self._logger

    def get_clock(self) -> Any:
        return types.SimpleNamespace(now=lambda: types.SimpleNamespace(nanoseconds=time.time_ns()))

    def create_lifecycle_publisher(self, msg_type: type, topic: str, qos_profile: Any) -> Publisher:
        self.publishers[topic] = Publisher(msg_type, topic, qos_profile)
        return self.publishers[topic]

    def create_subscription(
        self, msg_type: type, topic: str, callback: Callable[..., Any], qos_profile: Any, *, callback_group: Any = None
    ) -> Entity:
        return self._add(Entity(msg_type, topic, callback, qos_profile, callback_group))

    def create_service(
        self, srv_type: type, srv_name: str, callback: Callable[..., Any], *, callback_group: Any = None
    ) -> Entity:
        return self._add(Entity(srv_type, srv_name, callback, None, callback_group))

    def destroy_subscription(self, entity: Entity) -> None:
        assert self.entities.pop(entity.name) is entity

    destroy_service = destroy_subscription

    def destroy_node(self) -> None:
        self.entities.clear()

    def on_configure(self, state: Any) -> TransitionCallbackReturn:
        return SUCCESS

    on_cleanup = on_shutdown = on_error = on_configure

    def on_activate(self, state: Any) -> TransitionCallbackReturn:
        for publisher in self.publishers.values():
            publisher.activated = True
        return SUCCESS

    def on_deactivate(self, state: Any) -> TransitionCallbackReturn:
        for publisher in self.publishers.values():
            publisher.activated = False
        return SUCCESS

    # What tests call.

    def transition(self, name: str) -> TransitionCallbackReturn:
        """Make a transition as ``ros2 lifecycle set`` would. rclpy takes an exception for ERROR, and shows nothing."""
        start, end = (self.state, "finalized") if name == "shutdown" else self.STEPS[name]
        assert self.state == start, f"{name} from {self.state}"
        try:
            done = getattr(self, f"on_{name}")(start)
        except Exception:
            done = ERROR
        if done is SUCCESS:
            self.state = end
        elif done is ERROR:
            self.state = "unconfigured" if self.on_error(start) is SUCCESS else "finalized"
        return done

    def send(self, topic: str, message: Any) -> None:
        """Deliver a message, if somebody listens."""
        if (entity := self.entities.get(topic)) is not None:
            assert type(message).__name__ == entity.type.__name__
            entity.callback(message)

    def call(self, service: str) -> Any:
        entity = self.entities[service]
        return entity.callback(entity.type.Request(), entity.type.Response())

    def _add(self, entity: Entity) -> Entity:
        assert entity.name not in self.entities
        self.entities[entity.name] = entity
        return entity


@dataclass
class Time:
    sec: int = 0
    nanosec: int = 0


@dataclass
class Header:
    stamp: Time = field(default_factory=Time)
    frame_id: str = ""


@dataclass
class Image:
    """sensor_msgs/Image; ``data`` is an array.array of bytes, as rclpy has it."""

    header: Header = field(default_factory=Header)
    height: int = 0
    width: int = 0
    encoding: str = ""
    is_bigendian: int = 0
    step: int = 0
    data: array.array[int] = field(default_factory=lambda: array.array("B"))


@dataclass
class CompressedImage:
    header: Header = field(default_factory=Header)
    format: str = ""
    data: array.array[int] = field(default_factory=lambda: array.array("B"))


@dataclass
class String:
    data: str = ""


class Trigger:
    @dataclass
    class Request:
        pass

    @dataclass
    class Response:
        success: bool = False
        message: str = ""


MODULES = {
    "rclpy": {},
    "rclpy.callback_groups": {"MutuallyExclusiveCallbackGroup": type("MutuallyExclusiveCallbackGroup", (), {})},
    "rclpy.lifecycle": {"LifecycleNode": LifecycleNode, "TransitionCallbackReturn": TransitionCallbackReturn},
    "rclpy.qos": {"qos_profile_sensor_data": "best effort, the newest five"},
    "sensor_msgs": {},
    "sensor_msgs.msg": {"Image": Image, "CompressedImage": CompressedImage},
    "std_msgs": {},
    "std_msgs.msg": {"String": String},
    "std_srvs": {},
    "std_srvs.srv": {"Trigger": Trigger},
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stand-in be imported under ROS's names."""
    for name, members in MODULES.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
