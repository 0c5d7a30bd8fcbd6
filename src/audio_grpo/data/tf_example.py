"""The wire format of `tf.train.Example`, without TensorFlow."""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_Field = descriptor_pb2.FieldDescriptorProto
_KINDS = {
    "bytes_list": ("BytesList", _Field.TYPE_BYTES),
    "float_list": ("FloatList", _Field.TYPE_FLOAT),
    "int64_list": ("Int64List", _Field.TYPE_INT64),
}
"""Features' kinds in the order of their field numbers: name, message and the type of its values."""


def _schema() -> descriptor_pb2.FileDescriptorProto:
    """Example { Features features }, Features { map<string, Feature> feature }, Feature { oneof kind { *List } }."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, (message, value_type)) in enumerate(_KINDS.items(), start=1):
        values = file.message_type.add(name=message)
        values.field.add(name="value", number=1, label=_Field.LABEL_REPEATED, type=value_type)
        _add_message(feature, name, number, f".tensorflow.{message}").oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry", options=descriptor_pb2.MessageOptions(map_entry=True))
    entry.field.add(name="key", number=1, label=_Field.LABEL_OPTIONAL, type=_Field.TYPE_STRING)
    _add_message(entry, "value", 2, ".tensorflow.Feature")
    _add_message(features, "feature", 1, ".tensorflow.Features.FeatureEntry").label = _Field.LABEL_REPEATED
    _add_message(file.message_type.add(name="Example"), "features", 1, ".tensorflow.Features")
    return file


def _add_message(parent: descriptor_pb2.DescriptorProto, name: str, number: int, type_name: str) -> _Field:
    return parent.field.add(
        name=name, number=number, label=_Field.LABEL_OPTIONAL, type=_Field.TYPE_MESSAGE, type_name=type_name
    )


def _message_class() -> Any:
    pool = descriptor_pool.DescriptorPool()  # a pool of its own, so that TensorFlow's messages may be loaded beside it
    pool.Add(_schema())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


Example: Any = _message_class()
"""Message class with `tf.train.Example`'s fields and bytes."""
