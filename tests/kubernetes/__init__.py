"""A Kubernetes with one RayCluster, strict and fake, whose pods are real `ray start` processes.

    with running_cluster(document) as cluster:
        cluster.stack.openai().chat.completions.create(...)
        cluster.objects.pods()

What Ray's autoscaler talks to is ``api``; what KubeRay's operator would do with it, ``operator``;
what a pod is on this machine, ``nodes``; all of it put together, ``cluster``.
"""
