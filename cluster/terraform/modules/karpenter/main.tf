# What Karpenter needs in the account. Its NodePools are manifests: eks/karpenter, synced by Argo CD.

terraform {
  required_version = ">= 1.11, < 2.0"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "6.25.0"
    }
  }
}

variable "cluster" {
  type = string
}

variable "node_role_arn" {
  type = string
}

data "aws_caller_identity" "this" {}

data "aws_region" "this" {}

resource "aws_iam_role" "controller" {
  name = "${var.cluster}-karpenter"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = ["sts:AssumeRole", "sts:TagSession"]
      Principal = { Service = "pods.eks.amazonaws.com" }
    }]
  })
}

resource "aws_eks_pod_identity_association" "controller" {
  cluster_name    = var.cluster
  namespace       = "karpenter"
  service_account = "karpenter"
  role_arn        = aws_iam_role.controller.arn
}

# Changes only what bears this cluster's tag, and hands out no role but the nodes'.
resource "aws_iam_role_policy" "controller" {
  role = aws_iam_role.controller.name
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Sid    = "Read"
        Effect = "Allow"
        Action = [
          "ec2:DescribeCapacityReservations", "ec2:DescribeImages", "ec2:DescribeInstances",
          "ec2:DescribeInstanceTypeOfferings", "ec2:DescribeInstanceTypes", "ec2:DescribeLaunchTemplates",
          "ec2:DescribeSecurityGroups", "ec2:DescribeSpotPriceHistory", "ec2:DescribeSubnets",
          "pricing:GetProducts", "ssm:GetParameter", "iam:GetInstanceProfile", "iam:ListInstanceProfiles",
        ]
        Resource  = "*"
        Condition = { StringEquals = { "aws:RequestedRegion" = [data.aws_region.this.region, "us-east-1"] } }
      },
      {
        Sid      = "Cluster"
        Effect   = "Allow"
        Action   = "eks:DescribeCluster"
        Resource = "arn:aws:eks:${data.aws_region.this.region}:${data.aws_caller_identity.this.account_id}:cluster/${var.cluster}"
      },
      {
        Sid    = "MakeFrom"
        Effect = "Allow"
        Action = ["ec2:RunInstances", "ec2:CreateFleet"]
        Resource = [
          for kind in ["image", "snapshot", "security-group", "subnet", "capacity-reservation"] :
          "arn:aws:ec2:${data.aws_region.this.region}:*:${kind}/*"
        ]
      },
      {
        Sid    = "Make"
        Effect = "Allow"
        Action = ["ec2:RunInstances", "ec2:CreateFleet", "ec2:CreateLaunchTemplate", "ec2:CreateTags"]
        Resource = [
          for kind in ["fleet", "instance", "volume", "network-interface", "launch-template", "spot-instances-request"] :
          "arn:aws:ec2:${data.aws_region.this.region}:*:${kind}/*"
        ]
        Condition = { StringEquals = { "aws:RequestTag/kubernetes.io/cluster/${var.cluster}" = "owned" } }
      },
      {
        Sid       = "UseAndEnd"
        Effect    = "Allow"
        Action    = ["ec2:RunInstances", "ec2:CreateFleet", "ec2:TerminateInstances", "ec2:DeleteLaunchTemplate", "ec2:CreateTags"]
        Resource  = ["arn:aws:ec2:${data.aws_region.this.region}:*:instance/*", "arn:aws:ec2:${data.aws_region.this.region}:*:launch-template/*"]
        Condition = { StringEquals = { "aws:ResourceTag/kubernetes.io/cluster/${var.cluster}" = "owned" } }
      },
      {
        Sid       = "HandOut"
        Effect    = "Allow"
        Action    = "iam:PassRole"
        Resource  = var.node_role_arn
        Condition = { StringEquals = { "iam:PassedToService" = "ec2.amazonaws.com" } }
      },
      {
        Sid    = "Profiles"
        Effect = "Allow"
        Action = [
          "iam:CreateInstanceProfile", "iam:TagInstanceProfile", "iam:AddRoleToInstanceProfile",
          "iam:RemoveRoleFromInstanceProfile", "iam:DeleteInstanceProfile",
        ]
        Resource = "arn:aws:iam::${data.aws_caller_identity.this.account_id}:instance-profile/${var.cluster}_*"
      },
      {
        Sid      = "Notices"
        Effect   = "Allow"
        Action   = ["sqs:DeleteMessage", "sqs:GetQueueUrl", "sqs:ReceiveMessage"]
        Resource = aws_sqs_queue.notices.arn
      },
    ]
  })
}

# Two minutes' notice of spot nodes, rebalance hints and health events come by this queue.
resource "aws_sqs_queue" "notices" {
  name                      = "${var.cluster}-karpenter"
  message_retention_seconds = 300
  sqs_managed_sse_enabled   = true
}

resource "aws_sqs_queue_policy" "notices" {
  queue_url = aws_sqs_queue.notices.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Effect    = "Allow"
        Action    = "sqs:SendMessage"
        Resource  = aws_sqs_queue.notices.arn
        Principal = { Service = "events.amazonaws.com" }
      },
      {
        Effect    = "Deny"
        Action    = "sqs:*"
        Resource  = aws_sqs_queue.notices.arn
        Principal = "*"
        Condition = { Bool = { "aws:SecureTransport" = "false" } }
      },
    ]
  })
}

resource "aws_cloudwatch_event_rule" "notices" {
  for_each = {
    spot      = { source = "aws.ec2", type = "EC2 Spot Instance Interruption Warning" }
    rebalance = { source = "aws.ec2", type = "EC2 Instance Rebalance Recommendation" }
    state     = { source = "aws.ec2", type = "EC2 Instance State-change Notification" }
    health    = { source = "aws.health", type = "AWS Health Event" }
  }

  name          = "${var.cluster}-karpenter-${each.key}"
  event_pattern = jsonencode({ source = [each.value.source], detail-type = [each.value.type] })
}

resource "aws_cloudwatch_event_target" "notices" {
  for_each = aws_cloudwatch_event_rule.notices

  rule = each.value.name
  arn  = aws_sqs_queue.notices.arn
}

output "queue" {
  description = "Karpenter's settings.interruptionQueue."
  value       = aws_sqs_queue.notices.name
}
