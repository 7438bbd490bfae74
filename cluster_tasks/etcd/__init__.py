"""etcd as a client sees it: where it is (``address``) and what it does (``store``, which needs ``etcd3gw``)."""
