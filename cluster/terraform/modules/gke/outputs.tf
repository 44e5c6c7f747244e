output "name" {
  value = local.cluster.name
}

output "endpoint" {
  description = "Private: reached from the ranges of `administrators`."
  value       = local.cluster.endpoint
}
