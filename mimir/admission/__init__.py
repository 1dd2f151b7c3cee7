"""Admission: peers are judged by their evidence before anything of the mesh reaches them, and ever again."""
