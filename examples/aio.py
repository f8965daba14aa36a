"""Twelve questions at once with asyncio: the engine batches them."""

import asyncio

import argosy


async def main() -> None:
    async with argosy.AsyncClient() as client:
        model = (await anext(client.models())).name
        config = argosy.config(temperature=0, max_output_tokens=8)
        sums = [f"{number} + {number} =" for number in range(1, 13)]
        results = await asyncio.gather(*(client.generate(each, model=model, config=config) for each in sums))
        for question, result in zip(sums, results, strict=True):
            print(question, result.outputs[0].text.strip().splitlines()[0] if result.outputs[0].text.strip() else "")


asyncio.run(main())
