# A network of private nodes: out by NAT, nothing in but by the load balancer.

terraform {
  required_version = ">= 1.11, < 2.0"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "6.25.0"
    }
  }
}

variable "name" {
  type = string
}

variable "range" {
  description = "A /16; each zone gets a /19 of it for nodes and a /24 for NAT."
  type        = string
}

variable "zones" {
  type = list(string)
}

locals {
  zones = { for index, zone in var.zones : zone => index }
}

resource "aws_vpc" "this" {
  cidr_block           = var.range
  enable_dns_hostnames = true
  enable_dns_support   = true

  tags = { Name = var.name }
}

# Whatever is put into the default group by mistake reaches nobody.
resource "aws_default_security_group" "this" {
  vpc_id = aws_vpc.this.id
}

resource "aws_subnet" "nodes" {
  for_each = local.zones

  vpc_id                  = aws_vpc.this.id
  availability_zone       = each.key
  cidr_block              = cidrsubnet(var.range, 3, each.value)
  map_public_ip_on_launch = false

  tags = {
    Name                              = "${var.name}-nodes-${each.key}"
    "karpenter.sh/discovery"          = var.name
    "kubernetes.io/role/internal-elb" = "1"
  }
}

# For NAT gateways and load balancers only; nothing else is ever placed here.
resource "aws_subnet" "edge" {
  for_each = local.zones

  vpc_id                  = aws_vpc.this.id
  availability_zone       = each.key
  cidr_block              = cidrsubnet(var.range, 8, 192 + each.value)
  map_public_ip_on_launch = false

  tags = {
    Name                     = "${var.name}-edge-${each.key}"
    "kubernetes.io/role/elb" = "1"
  }
}

resource "aws_internet_gateway" "this" {
  vpc_id = aws_vpc.this.id
}

resource "aws_eip" "nat" {
  for_each = local.zones

  domain = "vpc"
}

resource "aws_nat_gateway" "this" {
  for_each = local.zones

  allocation_id = aws_eip.nat[each.key].id
  subnet_id     = aws_subnet.edge[each.key].id

  depends_on = [aws_internet_gateway.this]
}

resource "aws_route_table" "edge" {
  vpc_id = aws_vpc.this.id
}

resource "aws_route" "edge" {
  route_table_id         = aws_route_table.edge.id
  destination_cidr_block = "0.0.0.0/0"
  gateway_id             = aws_internet_gateway.this.id
}

resource "aws_route_table_association" "edge" {
  for_each = local.zones

  route_table_id = aws_route_table.edge.id
  subnet_id      = aws_subnet.edge[each.key].id
}

resource "aws_route_table" "nodes" {
  for_each = local.zones

  vpc_id = aws_vpc.this.id
}

resource "aws_route" "nodes" {
  for_each = local.zones

  route_table_id         = aws_route_table.nodes[each.key].id
  destination_cidr_block = "0.0.0.0/0"
  nat_gateway_id         = aws_nat_gateway.this[each.key].id
}

resource "aws_route_table_association" "nodes" {
  for_each = local.zones

  route_table_id = aws_route_table.nodes[each.key].id
  subnet_id      = aws_subnet.nodes[each.key].id
}

# Models come from S3 without a NAT's price per byte.
resource "aws_vpc_endpoint" "s3" {
  vpc_id            = aws_vpc.this.id
  service_name      = "com.amazonaws.${data.aws_region.this.region}.s3"
  vpc_endpoint_type = "Gateway"
  route_table_ids   = [for table in aws_route_table.nodes : table.id]
}

data "aws_region" "this" {}

resource "aws_cloudwatch_log_group" "flow" {
  name              = "/${var.name}/flow"
  retention_in_days = 30
}

resource "aws_iam_role" "flow" {
  name = "${var.name}-flow"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = "sts:AssumeRole"
      Principal = { Service = "vpc-flow-logs.amazonaws.com" }
    }]
  })
}

resource "aws_iam_role_policy" "flow" {
  role = aws_iam_role.flow.name
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect   = "Allow"
      Action   = ["logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"]
      Resource = "${aws_cloudwatch_log_group.flow.arn}:*"
    }]
  })
}

resource "aws_flow_log" "this" {
  vpc_id          = aws_vpc.this.id
  traffic_type    = "REJECT"
  iam_role_arn    = aws_iam_role.flow.arn
  log_destination = aws_cloudwatch_log_group.flow.arn
}

output "vpc" {
  value = aws_vpc.this.id
}

output "node_subnets" {
  value = [for subnet in aws_subnet.nodes : subnet.id]
}
