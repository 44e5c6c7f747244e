output "cluster" {
  value = module.cluster.name
}

output "models_bucket" {
  value = module.data.models_bucket
}

output "postgres_host" {
  value = module.data.postgres_host
}

output "postgres_secret" {
  value = module.data.postgres_secret
}

output "redis_address" {
  value = module.data.redis_address
}

output "redis_password" {
  value     = module.data.redis_password
  sensitive = true
}

output "redis_certificates" {
  value = module.data.redis_certificates
}

output "gpu_groups" {
  value = module.pools.groups
}
