"""Write docs/compatibility.md."""

from tests.conformance.compatibility.page import PATH, render

PATH.write_text(render(), encoding="utf-8")
print(f"wrote {PATH}")
