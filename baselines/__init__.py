"""The systems that HierMoE is compared with, one a file; found through conf/system/, never imported by hiermoe/."""
