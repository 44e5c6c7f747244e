# Which groups of GPU nodes the chart wants, read from its own values: nodes and pods cannot drift.

terraform {
  required_version = ">= 1.11, < 2.0"
}

variable "values_file" {
  description = "The chart's values that are deployed, such as charts/headrace/values-gke.yaml."
  type        = string
}

variable "accelerator_label" {
  description = "The node label by which the cloud names a GPU's model."
  type        = string
}

locals {
  pools = yamldecode(file(var.values_file)).pools
  # One entry for each group that may have nodes: pool-spot, pool-on-demand.
  entries = flatten([
    for pool, each in local.pools : [
      for kind, name in { spot = "spot", onDemand = "on-demand" } : {
        name                   = "${pool}-${name}"
        pool                   = pool
        spot                   = kind == "spot"
        gpus                   = each.gpus
        accelerator            = lookup(merge(each.nodeSelector, try(each[kind].nodeSelector, {})), var.accelerator_label, null)
        max_nodes              = each[kind].maxReplicas
      } if try(each[kind].maxReplicas, 0) > 0
    ]
  ])
}

output "groups" {
  description = "By name: pool, spot, gpus of a node, accelerator, max_nodes."
  value       = { for each in local.entries : each.name => each }

  precondition {
    condition     = alltrue([for each in local.entries : each.accelerator != null])
    error_message = "A pool has no ${var.accelerator_label} in its nodeSelector: which GPUs would its nodes have?"
  }
}
