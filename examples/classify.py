"""A headline into categories, zero-shot, with probabilities that sum to one."""

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    reply = client.classify("苹果公司发布新一代手机芯片", ["科技", "政治", "体育", "财经", "娱乐"], model=model)
    for score in reply.results[0].labels:
        print(f"{score.label} {score.probability:.3f}")
    print("sum", round(sum(score.probability for score in reply.results[0].labels), 4))
