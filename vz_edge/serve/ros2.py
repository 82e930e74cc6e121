"""A ROS 2 lifecycle node: pictures in, answers out (docs/robots.md).

::

    python -m vz_edge.serve.ros2 --ros-args -p bundle:=llava-13b -p "questions:=['Is the door open?']"

It subscribes to ``image`` (sensor_msgs/Image or CompressedImage) and ``question`` (std_msgs/String), publishes
``answers`` (std_msgs/String, JSON), and has a service ``ask`` (std_srvs/Trigger) that answers the configured questions
about the newest picture.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from vz_edge.device.model import EdgeModel
from vz_edge.errors import DependencyError, RequestError, VzEdgeError
from vz_edge.serve.robot import CameraSettings, PushedCamera, as_json, error_as_json, question_of
from vz_edge.watch import Result
from vz_edge.watch.encoding import NANOSECONDS, ros_frame

if TYPE_CHECKING:
    from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn

# A ROS parameter always has a value, of one type: 0 and "" stand for none, and an empty list would have no type.
PARAMETERS: dict[str, Any] = {
    "bundle": "",
    "questions": [""],
    "image_type": "raw",
    "every": 0.0,
    "deadline": 0.0,
    "unchanged_below": 0.0,
    "tokens": 0,
    "system": "",
    "provider": "",
    "device_id": 0,
    "threads": 0,
    "max_context": 0,
}
QUEUE_LENGTH = 10  # answers and questions that ROS keeps for who is slow


def node_class() -> type[LifecycleNode]:
    """The node's class; ``node_class()(parameter_overrides=[...])`` makes one. Raises DependencyError without ROS 2."""
    try:
        from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
        from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
        from rclpy.qos import qos_profile_sensor_data
        from sensor_msgs.msg import CompressedImage, Image
        from std_msgs.msg import String
        from std_srvs.srv import Trigger
    except ImportError as error:
        raise DependencyError(
            f"this Python has no ROS 2 ({error}); source the setup.bash of a ROS 2 distribution first"
        ) from error
    image_types = {"raw": Image, "compressed": CompressedImage}

    class VzEdgeNode(LifecycleNode):
        """Configure reads the parameters and loads the bundle, activate starts the answers, deactivate stops them."""

        def __init__(self, **arguments: Any) -> None:
            super().__init__("vz_edge", **arguments)
            for name, default in PARAMETERS.items():
                self.declare_parameter(name, default)
            self._answers = self.create_lifecycle_publisher(String, "answers", QUEUE_LENGTH)
            # Answers may take seconds: pictures and transitions do not wait for them.
            self._asking = MutuallyExclusiveCallbackGroup()
            self._listening = contextlib.ExitStack()
            self._model: EdgeModel | None = None
            self._camera: PushedCamera | None = None

        def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
            given = {name: self.get_parameter(name).value or None for name in PARAMETERS}
            try:
                if given["bundle"] is None:
                    raise RequestError("the parameter bundle is not set; expected a folder written by 'vz-edge export'")
                if given["image_type"] not in image_types:
                    raise RequestError(f"image_type {given['image_type']!r} is unknown; expected raw or compressed")
                self._image_type = image_types[given["image_type"]]
                self._questions = [question_of(text) for text in given["questions"] or [] if text.strip()]
                names = ("every", "deadline", "unchanged_below", "system", "tokens")
                self._settings = CameraSettings(**{name: given[name] for name in names})
                self._model = EdgeModel.load(
                    given["bundle"],
                    providers=[given["provider"]] if given["provider"] else None,
                    threads=given["threads"],
                    max_context=given["max_context"],
                    device=given["device_id"],
                )
            except VzEdgeError as error:
                return self._failure(error)
            return super().on_configure(state)

        def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
            assert self._model is not None, "ROS activates no node that was not configured"
            try:
                self._camera = PushedCamera(self._model, self._questions, self._settings, self._publish_result)
            except VzEdgeError as error:
                return self._failure(error)
            sensor_data = qos_profile_sensor_data
            image = self.create_subscription(self._image_type, "image", self._take_picture, sensor_data)
            self._listening.callback(self.destroy_subscription, image)
            question = self.create_subscription(
                String, "question", self._answer, QUEUE_LENGTH, callback_group=self._asking
            )
            self._listening.callback(self.destroy_subscription, question)
            service = self.create_service(Trigger, "ask", self._answer_all, callback_group=self._asking)
            self._listening.callback(self.destroy_service, service)
            return super().on_activate(state)

        def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
            self._stop()
            return super().on_deactivate(state)

        def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
            self._model = None
            return super().on_cleanup(state)

        def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
            self._stop()
            self._model = None
            return super().on_shutdown(state)

        def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
            self._stop()
            self._model = None
            return super().on_error(state)

        def destroy_node(self) -> None:
            self._stop()
            super().destroy_node()

        def _stop(self) -> None:
            self._listening.close()
            camera, self._camera = self._camera, None
            if camera is None:
                return
            try:
                camera.close()
            except Exception as error:  # what ended the answers before; rclpy would not show it
                self.get_logger().error(f"the answers had ended with {type(error).__name__}: {error}")

        def _failure(self, error: VzEdgeError) -> TransitionCallbackReturn:
            self.get_logger().error(str(error))
            return TransitionCallbackReturn.FAILURE

        def _take_picture(self, message: Any) -> None:
            if (camera := self._camera) is not None:
                camera.put(ros_frame(message, self.get_clock().now().nanoseconds / NANOSECONDS))

        def _answer(self, message: Any) -> None:
            if (camera := self._camera) is None:
                return
            try:
                question = question_of(message.data)
                answers = as_json(camera.ask([question]), [question])
            except VzEdgeError as error:
                answers = error_as_json(error)
            self._publish(answers)

        def _answer_all(self, _: Any, response: Any) -> Any:
            try:
                if (camera := self._camera) is None:
                    raise RequestError("the node is not active; activate it and ask again")
                result = camera.ask(self._questions)
            except VzEdgeError as error:
                response.success, response.message = False, error_as_json(error)
            else:
                response.success = result.error is None and not result.deadline_missed
                response.message = as_json(result, self._questions)
            return response

        def _publish_result(self, result: Result) -> None:
            self._publish(as_json(result, self._questions))

        def _publish(self, answers: str) -> None:
            if self.context.ok():  # not while ROS shuts down
                self._answers.publish(String(data=answers))

    return VzEdgeNode


def main() -> None:
    """Spin the node until ROS shuts down."""
    try:
        node_type = node_class()
    except DependencyError as error:
        print(f"vz-edge: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    import rclpy
    from rclpy.executors import ExternalShutdownException, MultiThreadedExecutor

    rclpy.init()
    node, executor = node_type(), MultiThreadedExecutor()
    executor.add_node(node)
    try:
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
