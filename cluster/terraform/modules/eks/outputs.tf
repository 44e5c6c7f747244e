output "name" {
  value = aws_eks_cluster.this.name
}

output "endpoint" {
  value = aws_eks_cluster.this.endpoint
}

output "security_group" {
  description = "Of nodes and control plane."
  value       = aws_eks_cluster.this.vpc_config[0].cluster_security_group_id
}

output "node_role" {
  value = aws_iam_role.nodes.name
}

output "node_role_arn" {
  value = aws_iam_role.nodes.arn
}
