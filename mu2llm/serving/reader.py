"""`VolumeReader`: scans → model input, in processes of their own, so that a large or hostile one blocks nobody."""

from __future__ import annotations

import asyncio
from typing import Any

from mu2llm import logs
from mu2llm.memory import machine_memory
from mu2llm.serving.decoder import Decoder, Reading, Scan
from mu2llm.serving.refusal import Refusal
from mu2llm.settings.serving import ServingConfig

OF_MACHINE = 0.8  # that one scan may take at most, whatever the setting says


class VolumeReader:
    """As many decoders as it takes requests at a time; those that are not needed are never started."""

    def __init__(self, settings: dict[str, Any]) -> None:
        logs.withhold()
        serving = ServingConfig.model_validate(settings)
        memory = min(int(serving.reading_gib * 2**30), int(OF_MACHINE * machine_memory()))
        self.decoders = [
            Decoder(serving.reading_seconds, memory, serving.max_slices)
            for _ in range(serving.reader.max_ongoing_requests)
        ]
        self.decoders[-1].start()
        self.free = asyncio.Semaphore(len(self.decoders))

    async def read(self, reading: Reading) -> Scan | Refusal:
        """The scan as `reading.spec` prepares it, or why there is none."""
        async with self.free:
            decoder = self.decoders.pop()  # the one used last: it is warm
            try:
                return await decoder.read(reading)
            finally:  # one that was killed is the last to be taken
                self.decoders.insert(len(self.decoders) if decoder.warm else 0, decoder)

    def __del__(self) -> None:
        for decoder in self.decoders:
            decoder.close()
