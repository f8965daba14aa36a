"""The bill of materials of an image: every Debian package and every distribution in it, as CycloneDX 1.6 in JSON."""

import uuid
from collections.abc import Iterable
from datetime import UTC, datetime

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from tools.images.archive import EPOCH

__all__ = ["bill"]


def bill(name: str, version: str, digest: str, components: Iterable[dict[str, str]]) -> str:
    """The document. `digest` of the image's manifest, hex; equal images have equal bills."""
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_OID, digest))
    bom.metadata.timestamp = datetime.fromtimestamp(EPOCH, UTC)
    image = Component(name=name, version=version, type=ComponentType.CONTAINER, bom_ref=f"sha256:{digest}")
    bom.metadata.component = image
    licenses = LicenseFactory()
    for component in components:
        purl = PackageURL.from_string(component["purl"])
        bom.components.add(
            Component(
                name=component["name"],
                version=component["version"],
                type=ComponentType.LIBRARY,
                purl=purl,
                bom_ref=component["purl"],
                licenses=[licenses.make_from_string(component["license"])] if component.get("license") else None,
            )
        )
    bom.register_dependency(image, bom.components)
    return JsonV1Dot6(bom).output_as_string(indent=1)
