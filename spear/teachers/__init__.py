"""Frozen teachers: audio in, frames of one layer out."""

from spear.teachers.base import Teacher, TeacherConfig, extract

__all__ = ["Teacher", "TeacherConfig", "extract"]
