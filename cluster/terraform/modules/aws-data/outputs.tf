output "kms_key" {
  value = aws_kms_key.this.arn
}

output "models_bucket" {
  value = aws_s3_bucket.models.id
}

output "postgres_host" {
  value = aws_db_instance.ledger.address
}

output "postgres_secret" {
  description = "Secrets Manager's name of the password."
  value       = aws_db_instance.ledger.master_user_secret[0].secret_arn
}

output "redis_address" {
  description = "For the chart's redis.address."
  value       = "rediss://${aws_elasticache_replication_group.gcs.primary_endpoint_address}:6379"
}

output "redis_password" {
  value     = random_password.redis.result
  sensitive = true
}
